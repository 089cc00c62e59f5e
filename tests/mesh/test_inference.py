"""Generation, captures and the model as an object: the same on every mesh; routing token by token."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from captures import Capture
from convert.__main__ import main as convert
from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.evaluate.scoring import Request, score
from jaxmoe.generate import engine
from jaxmoe.generate.__main__ import main as generate
from jaxmoe.routing.__main__ import main as routing
from peers.make_checkpoint import make_checkpoint
from tests.mesh import trial
from tests.mesh.test_program import exchanges
from tests.tolerances import bound

pytestmark = pytest.mark.usefixtures("unoptimized")

LENGTH = 32  # tokens of a sequence of the captured text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, unoptimized: None) -> pathlib.Path:
    """A folder with models, one of them also converted, a text, and what one device captures of the text."""
    folder = tmp_path_factory.mktemp("inference")
    make_checkpoint(folder / "model", trial.MIXED)
    make_checkpoint(folder / "plain", trial.PLAIN)
    convert(["hf2jax", str(folder / "plain"), str(folder / "converted")])
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(12)))
    capture(folder, "captured")
    return folder


def capture(folder: pathlib.Path, name: str, *further: str) -> Capture:
    """What `python -m jaxmoe.routing capture` writes."""
    command = ["capture", "--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--batch-size", "8"]
    routing([*command, "--seq-length", str(LENGTH), "--out", str(folder / name), *further])
    return Capture.open(folder / name)


def check_equal(found: Capture, expected: Capture) -> None:
    """Files, texts, experts and predicted tokens are the same; other numbers up to the order of sums."""
    assert {file.name for file in found.folder.iterdir()} == {file.name for file in expected.folder.iterdir()}
    assert found.tokens == expected.tokens > 0
    ours, theirs = found.read(0, found.tokens), expected.read(0, expected.tokens)
    for name in ("experts", "top_experts", "predicted"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, ours.text, theirs.text)
    limit = bound("mesh_fp32")
    for name in ("top_logits", "log_sum_exp", "entropy", "loss"):
        if getattr(theirs, name) is not None:
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=limit, atol=limit, err_msg=name)


MORE = ["data=2,fsdp=2,context=2", "data=2,context=2,expert=2", "fsdp=2,expert=2"]
MORE += ["data=8", "fsdp=4", "context=4", "expert=8", "data=2,fsdp=2,expert=2", "fsdp=2,context=2,expert=2"]


@pytest.mark.parametrize("mesh", [trial.ALL_AXES, *(pytest.param(mesh, marks=pytest.mark.wide) for mesh in MORE)])
def test_every_token_goes_to_the_same_experts(mesh: str, base: pathlib.Path) -> None:
    check_equal(capture(base, f"captured-{mesh}", "--mesh", mesh), Capture.open(base / "captured"))


@pytest.mark.wide
@pytest.mark.parametrize("mesh", ["data=2,expert=2", "fsdp=4"])
def test_texts_have_the_same_scores(mesh: str, base: pathlib.Path) -> None:
    """Five texts, of which two differ in their last token, three at a time."""
    texts = [(5, 9, 2, 7), (5, 9, 2, 8), (40, 3, 3), tuple(range(40)), (1, 2)]
    requests = [Request(tokens, 1 + len(tokens) // 3) for tokens in texts]
    one, several = (
        score(engine.Generator(Qwen3MoeForCausalLM.from_pretrained(base / "model", mesh=each)), requests, lambda _: 3)
        for each in ("data=1", mesh)
    )
    assert [found.is_greedy for found in several] == [found.is_greedy for found in one]
    sums = [[found.log_probability for found in scores] for scores in (several, one)]
    np.testing.assert_allclose(*sums, rtol=bound("mesh_fp32"))


def generated(
    base: pathlib.Path, form: str, name: str, capsys: pytest.CaptureFixture[str], *further: str
) -> tuple[str, Capture]:
    """(what `python -m jaxmoe.generate` prints for three prompts, what it captures)."""
    command = ["--model", str(base / form), "--prompt", "one", "--prompt", "two and", "--prompt", "3"]
    command += ["--max-new-tokens", "12", "--temperature", "1", "--repetition-penalty", "1.2", "--seed", "5"]
    generate([*command, "--capture", str(base / name), *further])
    return capsys.readouterr().out, Capture.open(base / name)


@pytest.mark.wide
@pytest.mark.parametrize("mesh", [trial.ALL_AXES, "context=4", "fsdp=2,expert=4"])
def test_effects_of_experts_are_the_same(mesh: str, base: pathlib.Path) -> None:
    def measured(name: str, *further: str) -> np.ndarray:
        command = ["effects", "--model", str(base / "model"), "--data", str(base / "text.txt"), "--batch-size", "8"]
        command += ["--seq-length", str(LENGTH), "--layers", "2", "--experts", "1,6", "--out", str(base / name)]
        routing([*command, *further])
        return np.genfromtxt(base / name, delimiter=",", names=True)

    several, one = measured(f"effects-{mesh}.csv", "--mesh", mesh), measured("effects.csv")
    for name in ("layer", "expert", "load", "same_prediction"):
        np.testing.assert_array_equal(several[name], one[name])
    limit = bound("mesh_fp32")
    for name in ("loss", "change", "low", "high", "kl"):  # changes are differences of losses
        np.testing.assert_allclose(several[name], one[name], rtol=limit, atol=limit, err_msg=name)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("mesh", "config"),
    [(trial.ALL_AXES, trial.MIXED), ("fsdp=2,expert=4", trial.MIXED), ("data=2,expert=2", trial.FOUR)],
)
def test_pruning_keeps_the_same_experts(mesh: str, config: Qwen3MoeConfig, base: pathlib.Path) -> None:
    """The saliency of every expert. In the last case tokens are gathered for the experts, else rows travel to them."""
    folder = base / f"pruned-{mesh}"
    make_checkpoint(folder / "model", config)

    def pruned(name: str, *further: str) -> np.ndarray:
        command = ["prune", "--model", str(folder / "model"), "--data", str(base / "text.txt"), "--batch-size", "8"]
        command += ["--seq-length", str(LENGTH), "--keep", "5", "--table", str(folder / f"{name}.csv")]
        routing([*command, "--out", str(folder / name), *further])
        return np.genfromtxt(folder / f"{name}.csv", delimiter=",", names=True)

    several, one = pruned("several", "--mesh", mesh), pruned("one")
    assert len(one) == config.num_experts * len(config.sparse_layers) and several.dtype == one.dtype
    for name in one.dtype.names or ():
        np.testing.assert_allclose(several[name], one[name], rtol=bound("mesh_fp32"), err_msg=name)
    for file in ("model.safetensors", "pruning.json"):
        assert (folder / "several" / file).read_bytes() == (folder / "one" / file).read_bytes()


@pytest.mark.wide
def test_imposed_experts_are_those_of_each_token(base: pathlib.Path) -> None:
    replay = "--replay", str(base / "captured")
    one = capture(base, "replayed", *replay)
    check_equal(capture(base, "replayed-on-mesh", *replay, "--mesh", "data=2,context=2,expert=2"), one)


@pytest.mark.parametrize(
    ("mesh", "further"),
    [
        ("expert=4", ()),
        pytest.param("data=2,fsdp=2,expert=2", ("--quantize", "nf4"), marks=pytest.mark.wide),
        pytest.param("data=2", ("--quantize", "nf4"), marks=pytest.mark.wide),
        pytest.param("fsdp=8", (), marks=pytest.mark.wide),
        pytest.param("data=2,expert=2", ("--force", "0:1"), marks=pytest.mark.wide),
    ],
)
def test_the_same_text_is_generated(
    mesh: str,
    further: tuple[str, ...],
    base: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a folder in HF form on one device, from a converted one on the mesh; no expert's weights travel."""
    one = f"generated-{mesh}"
    expected, captured = generated(base, "plain", one, capsys, *further)
    programs: list[Any] = []
    decode: Any = engine._decode

    def compiled(*arguments: Any, program: Any) -> Any:
        if not programs:
            programs.append(decode.lower(*arguments, program=program).compile())
        return programs[0](*arguments)

    monkeypatch.setattr(engine, "_decode", compiled)
    found, captured_on_mesh = generated(base, "converted", f"{one}-on-mesh", capsys, "--mesh", mesh, *further)
    assert found == expected and len(found) > 20
    check_equal(captured_on_mesh, captured)
    if mesh == "expert=4":
        share = trial.PLAIN.num_experts // 4 * trial.PLAIN.moe_intermediate_size * trial.PLAIN.hidden_size
        assert max(each.elements for each in exchanges(programs[0].as_text())) < share


@pytest.mark.wide
def test_the_model_as_an_object_is_the_same(base: pathlib.Path) -> None:
    """Logits, router logits and a gradient; what the devices cannot share is refused."""
    ids = np.random.default_rng(1).integers(0, trial.MIXED.vocab_size, (4, 16))
    results = []
    for mesh in ("data=1", "context=2,expert=2"):
        model = Qwen3MoeForCausalLM.from_pretrained(base / "model", mesh=mesh)

        def loss(model: Qwen3MoeForCausalLM) -> Any:
            out = model(ids, output_router_logits=True)
            assert out.aux_loss is not None
            return jnp.mean(out.logits**2) + out.aux_loss, out

        gradient = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.PathContains("gate")), has_aux=True)
        found, out = gradient(model)
        results.append([*jax.tree.leaves(found), out.logits, *out.router_logits])
    for one, several in zip(*results, strict=True):
        error = np.linalg.norm(np.asarray(several) - np.asarray(one)) / np.linalg.norm(one)
        assert error <= bound("mesh_fp32")
    with pytest.raises(UserError, match=r"seq_length: expected a multiple of 4 .*found 15; 12 or 16 would do"):
        model(ids[:, :15])
    with pytest.raises(UserError, match=r"batch_size: expected a multiple of 2 .*found 3"):
        model(ids[:3])


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("expert=32", "mesh: expert=32 needs 32 devices, found 16"),
        ("expert=3", r"mesh: expert: expected a divisor of the model's 8 experts \(1, 2, 4, 8\), found 3"),
        ("context=2", "mesh: context: only valid in training and capture"),
    ],
)
def test_a_mesh_that_cannot_generate_is_refused(mesh: str, message: str, base: pathlib.Path) -> None:
    with pytest.raises(UserError, match=message):
        generate(["--model", str(base / "model"), "--prompt", "one", "--mesh", mesh])


def test_a_text_that_devices_cannot_share_is_refused(base: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"batch_size: expected a multiple of 3"):
        capture(base, "none", "--mesh", "data=3")
    with pytest.raises(UserError, match=r"seq_length: expected a multiple of 6 .*found 32; 30 or 36 would do"):
        capture(base, "none", "--mesh", "context=3")
