# Two commands on a fresh machine: `make demo` and `make test`. Each sets itself up; they need Python 3.11+ and a package index.
PYTHON ?= python3
ENV ?= hopper
SEED ?= 0
RUN := .venv/bin/python
BEHAVIOR_hopper := --steps 230000 --eval-every 10000
BEHAVIOR_pendulum := --steps 10000 --random-steps 1000 --snapshot-every 500 --eval-every 1000
BEHAVIOR_walker2d := --steps 400000 --batch-size 128 --eval-every 10000
BEHAVIOR_halfcheetah := --steps 310000 --batch-size 128 --eval-every 10000
BEHAVIOR_cartpole := --steps 50000 --learning-rate 2.5e-4 --batch-size 128 --target-every 500
BEHAVIOR_acrobot := $(BEHAVIOR_cartpole)
BEHAVIOR_RUN := $(if $(filter cartpole acrobot,$(ENV)),dqn,sac)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: setup demo test test-learning test-more-learning test-runs test-losses lint data behavior results table plots bench

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup  ## build hopper-medium, train BC and TD3+BC briefly, print the scores, draw the learning curve
	$(RUN) results/demo.py

TEST := $(ONE_THREAD) $(RUN) -m pytest -q

test: setup  ## in four parts, two at a time, a thread each
	@echo "four parts, two at a time; each prints when it is over, the first in some minutes"
	@$(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),-Otarget) \
	    test-learning test-more-learning test-runs test-losses

test-learning:
	@$(TEST) tests/test_learning.py -k mixed_data

test-more-learning:
	@$(TEST) tests/test_learning.py -k "not mixed_data"

test-runs:
	@$(TEST) tests/test_runs.py

test-losses:
	@$(TEST) tests --ignore tests/test_learning.py --ignore tests/test_runs.py

lint: setup
	.venv/bin/ruff check .

data: setup  ## build every dataset of the suite that can be built, and the card
	$(RUN) results/behavior/collect.py all
	$(RUN) results/report.py card

behavior: setup  ## train behaviour policies online and choose the levels: make behavior ENV=hopper, resumes after a stop
	$(ONE_THREAD) $(RUN) algorithms/$(BEHAVIOR_RUN).py --online --env $(ENV) --seed $(SEED) $(BEHAVIOR_$(ENV)) \
	    $$(test -e runs/$(BEHAVIOR_RUN)-online/$(ENV)/seed$(SEED)/checkpoint.pt && echo --resume)
	$(RUN) results/behavior/choose.py $(ENV) runs/$(BEHAVIOR_RUN)-online/$(ENV)/seed$(SEED)

results: setup  ## the committed results: make results SEED=0, resumes after a stop
	$(RUN) results/grid.py --seed $(SEED)

table: setup
	$(RUN) results/report.py table

plots: setup
	$(RUN) results/report.py plots

bench: setup  ## updates/s, GFLOP per update, share of the machine's own matmul rate
	$(RUN) tests/bench.py
