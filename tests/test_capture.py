"""What a CUDA graph asks of every `update`, checked without a GPU, and what is around the graph:
resuming, policy.pt, fallback.

A graph replays for ever the kernels, numbers and addresses of the call that was recorded. So an
update must not wait for a tensor's value, make a tensor on the host or of a shape that depends on
values, and every call must do the same operations, with the same numbers, on the same memory. """
import ast
import importlib
import json
import random
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace

import common
from common import Dataset

import numpy as np
import pytest
import td3_bc
import torch
from conftest import ROOT
from helpers import SilentRun, ends_every_four, tiny_data, tiny_discrete_data
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")

# ---- The guard

FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
}
FROM_HOST = {"as_tensor", "asarray", "tensor"}
TO_HOST = {
    "__array__",
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "cpu",
    "item",
    "numpy",
    "tolist",
}
WAITS = {"_local_scalar_dense", "equal", "is_nonzero"}
SHAPES = {
    "_unique",
    "_unique2",
    "bincount",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class HostGuard(TorchFunctionMode):
    """Python's calls of torch: nothing is made on the host, nothing is brought there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if name in FACTORIES and not tensors:
            assert kwargs.get("device") is not None, f"torch.{name} without a device"
        assert name not in FROM_HOST, f"torch.{name} copies from the host"
        assert name not in TO_HOST, f"{name} waits for a value"
        if name == "to":
            assert "cpu" not in [x for x in args[1:] if isinstance(x, str)], (
                "a tensor goes to the CPU"
            )
        return function(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """The kernels of one call: names, shapes, numbers, and the addresses of tensors that the call
    did not make itself."""

    def __init__(self, alive: dict):
        super().__init__()
        self.operations = []
        self.own = set()  # storages made by this call
        # every storage of every call, so that no later one gets the same address by chance
        self.alive = alive

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        assert name not in WAITS, f"{name} waits for a value"
        assert name not in SHAPES, f"{name} has a shape that depends on values"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [
                x
                for x in tree_leaves(args[1])
                if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            ]
            assert not masks, "an index by a mask has a shape that depends on values"
        if name == "repeat_interleave":
            assert kwargs.get("output_size") is not None, (
                "repeat_interleave has a shape that depends on values"
            )
        if name == "normal":
            assert not tensors, "normal(tensor, tensor) waits for the smallest deviation"
        assert not any(isinstance(x, torch.Generator) for x in leaves), (
            "a graph knows the default random generator alone"
        )
        before = [x.untyped_storage()._cdata for x in tensors]
        self.alive.update({x.untyped_storage()._cdata: x.untyped_storage() for x in tensors})
        addresses = [x.data_ptr() for x, storage in zip(tensors, before) if storage not in self.own]
        out = function(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in before:
                self.own.add(x.untyped_storage()._cdata)
                self.alive[x.untyped_storage()._cdata] = x.untyped_storage()
        numbers = [x for x in leaves if isinstance(x, (bool, int, float))]
        self.operations.append(
            (str(function), [tuple(x.shape) for x in tensors], numbers, addresses)
        )
        return out


class Guard:
    """Stands in for record_on_cuda: three calls of each variant are watched, the third must do what
    the second did.

    The first may do more: it makes the optimizers' state. On CUDA the first three are not recorded,
    either. """

    def __init__(self):
        self.alive = {}
        self.seen = {}  # variant: the operations of its first calls

    def record_on_cuda(self, update, device):
        def watched(**variant):
            seen = self.seen.setdefault((update.func.__name__, *variant.items()), [])
            if len(seen) == 3:
                return update(**variant)
            recorder = Recorder(self.alive)
            with recorder, HostGuard():
                metrics = update(**variant)
            for value in tree_leaves(metrics):
                assert not value.requires_grad, (
                    "a metric would keep the graph of gradients of the call that was recorded"
                )
            seen.append(recorder.operations)
            if len(seen) == 3:
                self.compare(seen[2], seen[1])
            return metrics

        return watched

    @staticmethod
    def compare(now: list, before: list) -> None:
        for (name, shapes, numbers, addresses), old in zip(now, before):
            assert name == old[0], f"{name}, which was {old[0]} in the call before"
            assert shapes == old[1], f"{name} has other shapes than in the call before"
            assert numbers == old[2], (
                f"{name} has other numbers, {numbers}, than in the call before, {old[2]}"
            )
            assert addresses == old[3], (
                f"{name} reads or writes other memory than in the call before"
            )
        assert len(now) == len(before), "more or fewer operations than in the call before"


# ---- Every algorithm, in all its forms

# settings by their names, wherever a file has them: each stage lasts three updates or more, each
# network is small
SMALL = dict(
    steps=8,
    batch_size=8,
    eval_every=100,
    value_steps=3,
    actor_steps=3,
    vae_steps=3,
    behavior_steps=3,
    warm_up_steps=4,
    warm_start_steps=4,
    warmup_steps=6,
    policy_delay=2,
    target_every=2,
    num_samples=2,
    num_mmd_samples=2,
    num_critics=3,
    num_heads=3,
    passes=2,
    agents=2,
    dynamics_epochs=1,
    rollout_every=2,
    rollout_starts=8,
    horizon=2,
    retain=2,
    real_share=0.5,
    device="cpu",
)
# numbers for which a file has a form of its own; those of bool and Literal settings are found
OTHERS = {
    "bc": [dict(top_fraction=0.5)],
    "edac": [dict(diversity_weight=0.0)],
    "mopo": [dict(penalty_weight=0.0)],
}
FILES = [path.stem for path in sorted((ROOT / "algorithms").glob("*.py"))]


def forms(name: str) -> list[dict]:
    """Settings of every form: the default, and each other value of each setting that is a
    choice."""
    tree = ast.parse((ROOT / "algorithms" / f"{name}.py").read_text())
    (settings,) = [
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"
    ]
    found = [{}]
    for field in settings:
        kind, default = ast.unparse(field.annotation), ast.literal_eval(field.value)
        values = []
        if kind.startswith("Literal"):
            values = ast.literal_eval(field.annotation.slice)
        elif kind == "bool" and field.target.id != "resume":
            values = [True, False]
        found += [{field.target.id: value} for value in values if value != default]
    return found + OTHERS.get(name, [])


def kinds(name: str) -> list[str]:
    """The kinds of data that a file takes."""
    source = (ROOT / "algorithms" / f"{name}.py").read_text()
    found = [] if "discrete=True" in source else ["box"]
    if "discrete=True" in source or "discrete=None" in source:
        found.append("discrete")
    return found + ["images"] * ("images=True" in source)


def data_of(kind: str, action_dim: int) -> Dataset:
    torch.manual_seed(0)
    if kind == "box":
        return tiny_data(40, action_dim)
    data = tiny_discrete_data(40)
    if kind == "discrete":
        return data
    images = torch.randint(256, (40, 1, 36, 36), dtype=torch.uint8)
    columns = dict(
        obs=images,
        action=data.action,
        reward=data.reward,
        next_obs=images.flip(0),
        terminated=data.terminated,
        truncated=ends_every_four(40),
    )
    return Dataset("tiny", columns, data.action_space, data.env_spec, (0.0, 1.0))


class FolderRun(SilentRun):
    """With what the pre-fits of some files need of a Run."""
    folder = None
    stop = unsaved = False
    curve = ()
    dataset = dict(fingerprint="tiny")
    since = 0.0

    def snapshot(self):
        pass


def guarded_train(module, monkeypatch, folder, data: Dataset, settings: dict) -> Guard:
    """`train` of a file on small networks, with each of its recorded updates under the guard."""
    guard = Guard()
    for name, widths in vars(module).items():
        if name.endswith("HIDDEN"):
            monkeypatch.setattr(module, name, tuple(8 for _ in widths))
    monkeypatch.setattr(FolderRun, "folder", folder / "seed0")
    replaced = dict(
        Run=FolderRun,
        load_dataset=lambda *_, **__: data,
        record_on_cuda=guard.record_on_cuda,
        evaluate=lambda *_, **__: np.zeros(2),
    )
    for name, value in replaced.items():
        monkeypatch.setattr(module, name, value, raising=False)
    known = {field.name for field in fields(module.Args)}
    module.train(
        module.Args(**{key: value for key, value in (SMALL | settings).items() if key in known})
    )
    return guard


def save_two_policies(folder, data: Dataset) -> tuple[str, ...]:
    """For fqe.py, each with the record of its run."""
    for seed in range(2):
        (folder / f"seed{seed}").mkdir(parents=True)
        common.save_policy(
            folder / f"seed{seed}",
            "td3_bc",
            "td3_bc",
            td3_bc.Actor(data.obs_dim, data.action_dim),
            data,
        )
        (folder / f"seed{seed}" / "result.json").write_text(
            json.dumps({"final_returns": [float(seed)]})
        )
    return (str(folder),)


CASES = [(name, kind, form) for name in FILES for kind in kinds(name) for form in forms(name)]


def show(part) -> str:
    """A part of a test's name."""
    if not isinstance(part, dict):
        return part
    return " ".join(f"{key}={value}" for key, value in part.items()) or "default"


@pytest.mark.parametrize(("name", "kind", "form"), CASES, ids=show)
def test_an_update_could_be_recorded(name, kind, form, monkeypatch, tmp_path):
    module = importlib.import_module(name)
    # an imagined episode ends as the pendulum's, which has one action
    data = data_of(kind, 1 if hasattr(module, "imagine") else 2)
    if name == "fqe":
        monkeypatch.setattr(common, "export_policy", lambda *_: None)
        monkeypatch.setattr(td3_bc, "HIDDEN", (8, 8))
        form = form | dict(
            policies=save_two_policies(tmp_path / "policies", data), out=str(tmp_path)
        )
    guard = guarded_train(module, monkeypatch, tmp_path, data, form)
    assert guard.seen
    for (update, *variant), calls in guard.seen.items():
        assert len(calls) == 3, "this variant was not seen three times"
        print(
            f"capture: {name} | {kind} {form or ''} | {update} {dict(variant) or ''} | "
            f"{len(calls[2])} operations"
        )


@pytest.mark.parametrize("name", FILES)
def test_optimizers_are_fit_for_recording(name):
    """Adam keeps its step count on the device only if it is told so. The fit of a dynamics model
    alone is not recorded."""
    source = (ROOT / "algorithms" / f"{name}.py").read_text()
    found = 0
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and "torch.optim.Adam" in [
            ast.unparse(x).removesuffix("W") for x in (call.func, *call.args)
        ]:
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            found += 1
            if settings.get("lr") != "DYNAMICS_LR":
                assert settings.get("capturable") in ("data.device.type == 'cuda'", "on_cuda"), (
                    settings
                )
                assert settings.get("fused") == "True", settings
    assert found == source.count("torch.optim.Adam") and (found or "torch.optim.SGD" in source)


# ---- Each kind of fault, planted once: the guard must name it

@dataclass
class Toy:
    """What a small update works on."""
    weight: torch.Tensor
    target: torch.Tensor
    data: torch.Tensor
    optimizer: torch.optim.Optimizer
    calls: int = 0


def make_toy() -> Toy:
    weight = torch.ones(4, requires_grad=True)
    return Toy(
        weight,
        torch.ones(4),
        torch.linspace(-1, 1, 40).reshape(10, 4),
        torch.optim.Adam([weight], fused=True),
    )


def sound(toy: Toy) -> dict:
    """An update without fault."""
    batch = toy.data.index_select(0, torch.randint(10, (5,), device=toy.data.device))
    loss = (batch * toy.weight - 1).pow(2).mean()
    toy.optimizer.zero_grad()
    loss.backward()
    toy.optimizer.step()
    with torch.no_grad():
        toy.target.lerp_(toy.weight, 0.01)
    return {"loss": loss.detach()}


def with_fault(fault):
    """The fault, and the sound update after it."""
    def faulty(toy: Toy) -> dict:
        changed = fault(toy)
        return sound(toy) | (changed if isinstance(changed, dict) else {})

    return faulty


def branch(toy):
    if toy.target.mean() > 0:
        toy.target.mul_(0.5)


def alternate(toy):
    toy.calls += 1
    if toy.calls % 2:
        toy.target.mul_(0.5)


def count(toy):
    toy.calls += 1
    toy.target.mul_(1 / toy.calls)


def grow(toy):
    toy.calls += 1
    toy.data[:toy.calls].sum()


def replace_target(toy):
    toy.target = toy.target * 0.5


def replace_data(toy):
    toy.data = toy.data.clone()


def plain_adam(toy):
    """Neither fused nor capturable: the step count is brought to the host."""
    if toy.calls == 0:
        toy.optimizer = torch.optim.Adam([toy.weight])
    toy.calls += 1


def by_schedule(toy):
    toy.optimizer.param_groups[0]["lr"] *= 0.9


FAULTS = [
    ("waits for a value", lambda toy: {"loss": toy.target * toy.target.mean().item()}),
    ("waits for a value", lambda toy: {"loss": toy.target * float(toy.target.mean())}),
    ("waits for a value", branch),
    ("waits for a value", lambda toy: {"loss": toy.target * toy.target.tolist()[0]}),
    ("waits for a value", lambda toy: {"loss": toy.target * toy.target.numpy().sum()}),
    ("waits for a value", lambda toy: {"loss": toy.target.cpu()}),
    ("waits for a value", lambda toy: {"loss": toy.target * np.asarray(toy.target).sum()}),
    ("waits for a value", lambda toy: {"loss": toy.data[: int(toy.target.sum())]}),
    ("waits for a value", lambda toy: toy.target.mul_(1 + torch.equal(toy.target, toy.weight))),
    ("copies from the host|waits for a value", plain_adam),
    ("waits for the smallest", lambda toy: {"loss": torch.normal(toy.target, toy.target.abs())}),
    ("goes to the CPU", lambda toy: {"loss": toy.target.to("cpu")}),
    ("without a device", lambda toy: {"loss": toy.target + torch.zeros(4)}),
    ("without a device", lambda toy: {"loss": toy.target + torch.randn(4)}),
    ("without a device", lambda toy: {"loss": toy.data[torch.randint(10, (5,))]}),
    ("copies from the host", lambda toy: {"loss": toy.target + torch.tensor(1.0)}),
    ("other memory", lambda toy: {"loss": toy.target + torch.from_numpy(np.ones(4))}),
    ("copies from the host", lambda toy: {"loss": toy.target + torch.as_tensor([1.0], device=CPU)}),
    ("depends on values", lambda toy: {"loss": toy.data[toy.data[:, 0] > 0]}),
    ("depends on values", lambda toy: toy.data.__setitem__(toy.data > 2, 0.0)),
    ("depends on values", lambda toy: {"loss": toy.data.masked_select(toy.data > 0)}),
    ("depends on values", lambda toy: {"loss": torch.where(toy.data > 0)[0].float()}),
    ("depends on values", lambda toy: {"loss": toy.data.nonzero().float()}),
    ("depends on values", lambda toy: {"loss": toy.data.unique()}),
    (
        "depends on values",
        lambda toy: {"loss": toy.data.repeat_interleave(toy.target.long().abs(), dim=1)},
    ),
    (
        "default random generator",
        lambda toy: {"loss": torch.rand(4, device=CPU, generator=torch.Generator())},
    ),
    ("other numbers", lambda toy: toy.target.mul_(random.random())),
    ("other numbers", lambda toy: toy.target.mul_(np.random.rand())),
    ("other numbers", count),
    ("other numbers", by_schedule),
    ("which was|operations than", alternate),
    ("other shapes|other numbers", grow),
    ("other memory", replace_target),
    ("other memory", replace_data),
    ("keep the graph of gradients", lambda toy: {"loss": toy.weight.sum()}),
]


def run_thrice(update) -> None:
    torch.manual_seed(0)
    once = Guard().record_on_cuda(partial(update, make_toy()), CPU)
    for _ in range(3):
        once()


def test_the_guard_lets_a_sound_update_pass():
    run_thrice(sound)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_the_guard_catches_a_planted_fault(number):
    message, fault = FAULTS[number]
    with pytest.raises(AssertionError, match=message):
        run_thrice(with_fault(fault))


def test_the_guard_catches_a_fault_in_an_algorithm(monkeypatch, tmp_path):
    """TD3+BC that logs by float(), and whose target network is replaced by a copy: seen through the
    real `train`."""
    loss = td3_bc.critic_loss
    monkeypatch.setattr(
        td3_bc,
        "critic_loss",
        lambda *args: (loss(*args)[0], torch.zeros((), device=CPU) + float(loss(*args)[1])),
    )
    with pytest.raises(AssertionError, match="waits for a value"):
        guarded_train(td3_bc, monkeypatch, tmp_path, tiny_data(40), {})
    monkeypatch.setattr(td3_bc, "critic_loss", loss)

    def replace(target, online, rate):
        for old, new in zip(target.parameters(), online.parameters()):
            old.data = old.data.lerp(new.data, rate)

    monkeypatch.setattr(td3_bc, "polyak_update", replace)
    with pytest.raises(AssertionError, match="other memory"):
        guarded_train(td3_bc, monkeypatch, tmp_path, tiny_data(40), {})


# ---- Around the graph


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.events.append("new")

    def replay(self):
        self.events.append("replay")


@pytest.fixture
def events(monkeypatch):
    """What happens to stand-ins for torch's graphs, generator and stream."""
    events = []

    class Recording(nullcontext):
        def __enter__(self):
            events.append("record")

    generator = SimpleNamespace(
        clone_state=lambda: "state before", graphsafe_set_state=lambda state: events.append(state)
    )
    monkeypatch.setattr(Graph, "events", events, raising=False)
    for name, value in dict(
        CUDAGraph=Graph,
        graph=Recording,
        default_generators=[generator],
        current_device=lambda: 0,
        current_stream=lambda: "stream before",
        set_stream=events.append,
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return events


def test_each_variant_warms_up_thrice_and_is_recorded_once(events):
    def update(flag):
        events.append(flag)
        return {"flag": flag}

    recorded = common.record_on_cuda(update, SimpleNamespace(type="cuda"))
    got = [recorded(flag=flag) for flag in [True] * 5 + [False] * 4 + [True]]
    assert events == [True] * 3 + ["new", "record", True, "replay", "replay"] + [False] * 3 + [
        "new", "record", False, "replay", "replay"]
    assert got[3] is got[4] is got[9] and got[8] == {"flag": False}
    assert common.record_on_cuda(update, CPU) is update


def test_an_update_that_cannot_be_recorded_runs_eagerly_with_one_notice(events, capsys):
    """Every call takes effect once, in all variants; the random generator and the stream are as
    before the attempt."""
    done = []

    def update(flag):
        if events and events[-1] == "record":
            raise RuntimeError(
                "CUDA error: operation not permitted when stream is capturing\nmany more lines"
            )
        done.append(flag)
        return {"flag": flag}

    recorded = common.record_on_cuda(update, SimpleNamespace(type="cuda"))
    flags = [True] * 6 + [False] * 6
    assert [recorded(flag=flag)["flag"] for flag in flags] == flags == done
    assert events == ["new", "record", "stream before", "state before"]
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("note: ")
        and "eagerly" in line
        and "not permitted" in line
        and "many more" not in line
    )


def small_run(
    out, monkeypatch, device: str = "cpu", **args
) -> tuple[common.Run, torch.nn.Module, torch.optim.Optimizer, int]:
    """A Run that has begun, with one network and one optimizer."""
    torch.manual_seed(0)
    data = tiny_data()
    data.device = SimpleNamespace(type=device)
    monkeypatch.setattr(td3_bc, "HIDDEN", (8, 8))
    run = common.Run(td3_bc.Args(env="tiny", out=str(out), steps=10, device="cpu", **args), data)
    actor = td3_bc.Actor(data.obs_dim, data.action_dim)
    optimizer = torch.optim.Adam(
        actor.parameters(), fused=True, capturable=data.device.type == "cuda"
    )
    return run, actor, optimizer, run.begin({"actor": actor, "optimizer": optimizer}, actor)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_checkpoint_of_a_cpu_is_resumed_for_the_device_at_hand(device, monkeypatch, tmp_path):
    """On CUDA, an optimizer whose step count is on the host can't be recorded, and a checkpoint of
    a CPU says so."""
    run, actor, optimizer, _ = small_run(tmp_path, monkeypatch)
    actor.net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    run.save(7)
    run.close()
    assert optimizer.state_dict()["param_groups"][0]["capturable"] is False

    # a checkpoint's tensors go where the data are; on this machine they stay on the CPU
    load = torch.load
    monkeypatch.setattr(
        torch,
        "load",
        lambda path, map_location, **settings: load(path, map_location="cpu", **settings),
    )
    run, _, resumed, step = small_run(tmp_path, monkeypatch, device, resume=True)
    run.close()
    assert step == 7
    assert [group["capturable"] for group in resumed.param_groups] == [device == "cuda"]


def test_policy_pt_holds_cpu_tensors(monkeypatch, tmp_path):
    """Whatever the device of training, for which PyTorch's "meta" stands: the copy that is saved
    goes to the CPU first."""
    exported = []
    monkeypatch.setattr(td3_bc, "HIDDEN", (8, 8))
    # meta's have no numbers to copy
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda self: self.to_empty(device="cpu"))
    monkeypatch.setattr(
        common, "export_policy", lambda actor, obs, path: exported.append((actor, obs))
    )
    data = tiny_data()
    actor = td3_bc.Actor(3, 2).to("meta")
    common.save_policy(tmp_path, "td3_bc", "td3_bc", actor, data)
    saved = torch.load(tmp_path / "policy.pt", weights_only=True)
    assert {x.device.type for x in saved["actor"].values()} == {"cpu"}
    assert {x.device.type for x in actor.state_dict().values()} == {"meta"}
    ((copied, obs),) = exported
    assert {x.device.type for x in (obs, *copied.state_dict().values())} == {"cpu"}
