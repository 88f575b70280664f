# Two commands on a fresh machine: `make demo` and `make test`. Each does its own set-up; they need
# Python 3.11 or newer and a package index.
PYTHON ?= python3
ENV ?= hopper
SEED ?= $(or $(SEED_$(ENV)),0)
PART ?= 1
JOBS ?= 2
RUN := .venv/bin/python
# the trainings behind the shipped behaviour policies
SEED_hopper := 2
BEHAVIOR_hopper := --steps 150000
BEHAVIOR_walker2d := --steps 500000
BEHAVIOR_halfcheetah := --steps 200000
BEHAVIOR_pendulum := --steps 10000 --random-steps 1000 --snapshot-every 500
BEHAVIOR_cartpole := --steps 50000 --random-steps 500 --batch-size 128 --snapshot-every 500
BEHAVIOR_acrobot := $(BEHAVIOR_cartpole)
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: setup demo test test-long test-learning test-runs test-losses test-lessons lint data behavior \
    results tables lessons bench

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup  ## build hopper-medium-replay, train a clone and a method of the notes, draw both
	$(RUN) results/demo.py

TEST := $(ONE_THREAD) $(RUN) -m pytest -q

test: setup  ## in four parts, two at a time, a thread each
	@echo "four parts, two at a time; each prints when it is over, the first in a minute or two"
	@$(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),-Otarget) \
	    test-learning test-losses test-runs test-lessons

test-learning:
	@$(TEST) tests/test_learning.py

test-runs:
	@$(TEST) tests/test_runs.py tests/test_data.py tests/test_cases.py

test-lessons:
	@$(TEST) tests/test_lessons.py

test-losses:
	@$(TEST) tests --ignore tests/test_learning.py --ignore tests/test_runs.py \
	    --ignore tests/test_data.py --ignore tests/test_cases.py --ignore tests/test_lessons.py

test-long: setup  ## the learning tests that take minutes each
	LONG_TESTS=1 $(TEST) tests/test_learning.py

lint: setup
	.venv/bin/ruff check .

data: setup  ## build every dataset of the suite that is absent or out of date, and the card
	$(RUN) results/behavior/collect.py all
	$(RUN) results/report.py card

behavior: setup  ## train behaviour policies online, choose the levels: make behavior ENV=hopper
	$(ONE_THREAD) $(RUN) results/behavior/train.py $(ENV) --seed $(SEED) $(BEHAVIOR_$(ENV)) \
	    $$(test -e runs/behavior/$(ENV)/seed$(SEED)/checkpoint.pt && echo --resume)
	$(RUN) results/behavior/choose.py $(ENV) runs/behavior/$(ENV)/seed$(SEED)

results: setup  ## a part of the grid of results: make results PART=1 JOBS=2; resumes after a stop
	$(RUN) results/grid.py --part $(PART) --jobs $(JOBS)

tables: setup  ## tables and pictures of results/README.md, from committed results
	$(RUN) results/report.py tables
	$(RUN) results/report.py figures

lessons: setup  ## the notes in pictures: each lesson's picture anew
	for lesson in results/lessons/*_*.py; do $(ONE_THREAD) $(RUN) $$lesson || exit 1; done

bench: setup  ## updates/s, GFLOP per update, share of the machine's own matmul rate
	$(RUN) tests/bench.py
