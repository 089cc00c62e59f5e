"""The parity suite as a user runs it, each of three sides in its own process: the demo checkpoint and unusual ones."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from jaxmoe.config import Qwen3MoeConfig
from peers.configs import CONFIGS, config_of, random_parameters
from tests import oracle
from tests.conftest import BITSANDBYTES
from tests.parity import bisection, cases, engine, make_batch, measures
from tests.parity.batches import CHECKPOINT
from tests.parity.exact import Exact
from tests.parity.plan import Case, Plan, write_batch
from tests.parity.report import write_report
from tests.parity.results import RESULTS, evaluate, failures, write_results
from tests.parity.suite import trained_cases
from tests.parity.weights import Weights
from tests.tolerances import bound

# Each runs free in float32, with these planted faults; some also run in 16 bit.
ODD: dict[str, tuple[str, ...]] = {
    "plain_v4": (
        "gate and up swapped",
        "no renormalisation",
        "rotary base 10 % off",
        "q and k norm missing",
        "experts permuted",
        "documents joined",
    ),
    "top_8_of_32_unnormalised": ("softmax after top-k",),
    "sparse_step_2": (),
    "wide_heads": (),
    "tied": (),
    "attention_bias": (),
    "rope_yarn_v4": (),
    "sliding_window": (),
    "odd_sizes": (),
}
SIXTEEN_BIT = ("top_8_of_32_unnormalised",)


def demo_cases(folder: pathlib.Path) -> list[Case]:
    """The demo checkpoint in float32, bfloat16, NF4 and FP8, and with adapters: what two cores can do in two minutes.

    `make parity` has more: pinned runs in float32, all faults, training in bfloat16.
    """
    selected = trained_cases("demo", CHECKPOINT, folder, rows=2, faults=True)
    by_name = {case.name.removeprefix("demo-"): case for case in selected}
    one_row = str(write_batch(folder / "one-row.batch", cases.text_batch(CHECKPOINT, rows=1)))
    out = [
        replace(by_name["fp32"], runs=("free",), faults=(), mesh="context=2,expert=2"),
        replace(by_name["bf16"], batch=one_row),
        replace(by_name["adapter-fp32"], batch=one_row, mesh="context=4"),
    ]
    if BITSANDBYTES:
        engine.quantize([(CHECKPOINT, folder / "demo-nf4")], "bfloat16", "cpu")
        out.append(replace(by_name["nf4-fp32"], batch=one_row))
        out.append(replace(by_name["nf4-bf16"], batch=one_row, runs=("pinned",)))
        out.append(replace(by_name["nf4-adapter-fp32"], batch=one_row))
    cases.write_fp8(CHECKPOINT, folder / "demo-fp8")
    return [*out, replace(by_name["fp8-fp32"], batch=one_row)]


def odd_cases(folder: pathlib.Path) -> list[Case]:
    """Checkpoints that transformers wrote, config.json in the form of 4 or 5; one packed sequence of 600 tokens."""
    out = []
    for name, faults in ODD.items():
        checkpoint = str(cases.write_odd_checkpoint(folder / name, name))
        batch = str(write_batch(folder / f"{name}.batch", cases.random_batch(config_of(name), rows=1)))
        out.append(Case(f"{name}-fp32", checkpoint, "float32", batch, runs=("free",), faults=faults))
        if name in SIXTEEN_BIT:
            out.append(Case(f"{name}-bf16", checkpoint, "bfloat16", batch))
    return out


@pytest.mark.long
def test_three_sides_agree_and_every_fault_is_caught(tmp_path: pathlib.Path) -> None:
    """In one plan, because the sides' processes start slowly."""
    plan = Plan(tmp_path, "cpu", (*demo_cases(tmp_path), *odd_cases(tmp_path)))
    engine.run(plan)
    results = [evaluate(plan, case) for case in plan.cases]
    failed = [f"{r['figures']['case']}: {line}" for r in results for line in failures(r)]
    assert not failed, "\n".join(failed)
    # NF4 has the tenth.
    assert len({fault for r in results for fault in r["faults"]}) == (10 if BITSANDBYTES else 9)
    # The report holds every case, and is self-contained.
    write_results(plan, results)
    page = write_report([tmp_path / RESULTS], tmp_path / "report", "Parity").read_text(encoding="utf-8")
    assert all(case.name in page for case in plan.cases)
    assert "Passed" in page and "data:image/png;base64," in page and 'src="http' not in page


def test_bisection_names_the_operation(tmp_path: pathlib.Path) -> None:
    """A planted fault is traced to the operation that it changes, in a case of one layer and one sequence."""
    fault = "rotary base 10 % off"
    folder = cases.write_odd_checkpoint(tmp_path / "model", "plain")
    batch = str(write_batch(tmp_path / "batch", cases.random_batch(config_of("plain"), rows=2, length=64)))
    case = Case("plain", str(folder), "float32", batch, runs=("free",), faults=(fault,))
    plan = Plan(tmp_path / "run", "cpu", (case,), sides=("transformers", "jaxmoe"))
    engine.run(plan)
    cause = bisection.explain_run(plan, case, "jaxmoe", f"free+{fault}")
    assert (cause["layer"], cause["operation"]) == (0, "q_rotary")
    assert max(cause["errors"][name] for name in ("input_layernorm", "q_norm", "v_proj")) <= bound("bisection_fp32")
    minimal = plan.folder / cause["case"] / "model"
    assert Qwen3MoeConfig.from_pretrained(minimal).num_hidden_layers == 1


@pytest.mark.parametrize("name", ["plain_v4", "top_8_of_32_unnormalised", "sparse_step_2", "rope_yarn_v4", "tied"])
def test_the_two_oracles_agree(name: str, tmp_path: pathlib.Path) -> None:
    """The two oracles, one that streams a checkpoint and one in NumPy; they share only the rotary frequencies."""
    folder = cases.write_odd_checkpoint(tmp_path / name, name)
    config, batch = config_of(name), make_batch(config_of(name), [[48], [13, 1, 34]])
    exact = oracle.forward(config, random_parameters(config), *batch)
    with torch.no_grad():
        found = Exact(config, Weights(folder, torch.float32, "cpu")).forward(batch)
    for what in ("logits", "hidden", "router_logits"):
        assert measures.relative_error(found[what].numpy(), getattr(exact, what)) <= bound("oracles_fp64"), what
    assert (found["selected"].numpy() == exact.selected).all()
    aux = oracle.load_balancing_loss(exact.router_logits, exact.selected)
    assert float(found["aux_loss"]) == pytest.approx(aux, rel=bound("oracles_fp64"))


@pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes is not installed")
def test_weights_decode_as_bitsandbytes_does(tmp_path: pathlib.Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import save_file

    matrix = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    # flattened, since bitsandbytes on CPUs decodes no rows of half a block
    packed, state = quantize_4bit(matrix.view(1, -1), compress_statistics=True, quant_type="nf4")
    tensors = {"w": packed} | {f"w.{name}": value for name, value in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        found = Weights(tmp_path, dtype, "cpu")["w"]
        assert torch.equal(found, dequantize_4bit(packed, state)), dtype
        assert not torch.equal(found.flatten(), matrix.flatten().to(dtype))


def test_measures() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((2, 5, 40))
    log_p, log_q = (np.log(oracle.softmax(x)) for x in (p, q))
    plain = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert measures.kl_divergence(p, q) == pytest.approx(plain, rel=bound("measures_fp64"))
    # The plain sum has lost all digits here; this one has not: KL is half the variance of a small difference.
    small = 1e-9 * rng.standard_normal((5, 40))
    mean = (np.exp(log_p) * small).sum(-1, keepdims=True)
    half_variance = (np.exp(log_p) * (small - mean) ** 2).sum(-1) / 2
    assert measures.kl_divergence(p, p + small) == pytest.approx(half_variance, rel=bound("measures_small_kl"))
    errors = measures.logit_errors(q, p)
    assert errors.kl == pytest.approx(plain, rel=bound("measures_fp64")) and errors.max_abs == np.abs(q - p).max()
    assert errors.relative == pytest.approx(measures.relative_error(q, p), rel=bound("measures_fp64"))
    assert measures.logit_errors(p + 1, p).top10 == 1 and measures.logit_errors(-p, p).top1 == 0


def test_flips_and_gaps() -> None:
    logits = np.asarray([[[[3.0, 2.0, 1.9, 0.0], [1.0, 0.0, 3.0, 2.0]]]])
    expected = oracle.top_k(logits, 2)
    noisy = logits + [0, -0.1, 0.1, 0]
    (flip,) = measures.flips(oracle.top_k(noisy, 2), expected, logits)
    assert (flip.slot, flip.row, flip.token, flip.lost, flip.gained) == (0, 0, 0, (1,), (2,))
    assert flip.margin == pytest.approx(0.1)
    assert measures.gap_errors(noisy, logits) == pytest.approx(0.2)  # no flip can have a wider margin
    assert not measures.differing(expected[..., ::-1], expected).any()  # the order does not count
    assert np.isinf(measures.margins(logits, 4)).all()


def test_the_command_refuses_bad_input(run_module: Callable, tmp_path: pathlib.Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    for arguments, message in (
        (["--checkpoint", tmp_path / "none", "--out", tmp_path / "a"], "none"),
        (["--checkpoint", CHECKPOINT, "--out", tmp_path], "does not exist yet"),
        (["--checkpoint", CHECKPOINT, "--out", tmp_path / "b", "--dtype", "int8"], "--dtype: expected"),
        (["--checkpoint", CHECKPOINT, "--out", tmp_path / "c", "--length", 9999], "--length: expected at most 2048"),
        (["--checkpoint", CHECKPOINT, "--out", tmp_path / "d", "--length", 0], "--length: expected at least 8"),
        (["--checkpoint", CHECKPOINT, "--out", tmp_path / "e", "--parallel", 0], "--parallel: expected at least 1"),
        (
            ["--checkpoint", CHECKPOINT, "--out", tmp_path / "f", "--quantize", "fp8-rows", "--adapter", "random"],
            "fp8-rows: expected no --adapter",
        ),
        (["--checkpoint", CHECKPOINT, "--out", tmp_path / "g", "--adapter", tmp_path], "found no adapter_config.json"),
        (["--checkpoint", CHECKPOINT, "--out", tmp_path / "h", "--prompt", tmp_path / "short.txt"], "found 1"),
        (["--checkpoint", CHECKPOINT, "--out", tmp_path / "i", "--prompt", tmp_path / "bytes.txt"], "expected UTF-8"),
        (
            ["--checkpoint", CHECKPOINT, "--out", tmp_path / "j", "--mesh", "expert=3"],
            "expected a divisor of the model",
        ),
        (["--checkpoint", CHECKPOINT, "--out", tmp_path / "k", "--mesh", "data=4"], "divisor of the 2 sequences"),
    ):
        done = run_module("tests.parity", *arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"short.txt", "bytes.txt"}


@pytest.mark.parametrize(
    ("form", "faults"),
    [("nf4", ["NF4 nibbles swapped", "NF4 scale of another block"]), ("fp8-rows", ["FP8 scale off by one block"])],
)
def test_the_command_plants_the_faults_of_its_form(form: str, faults: list[str], tmp_path: pathlib.Path) -> None:
    """In float32 beside those of the model; in 16 bit on a GPU, where the kernels run, alone."""
    from tests.parity import __main__ as command

    arguments = ["--checkpoint", str(CHECKPOINT), "--out", str(tmp_path), "--quantize", form, "--faults"]
    for device in ("cpu", "gpu"):
        args = command.parsed([*arguments, "--device", device])
        in_32, in_16 = command.cases_of(args, Qwen3MoeConfig.from_pretrained(CHECKPOINT))
        assert [each.faults[-len(faults) :] for each in (in_32, in_16)] == [
            tuple(faults),
            tuple(faults) if device == "gpu" else (),
        ]
        assert in_16.quantized == str(tmp_path / form.removesuffix("-rows")) and in_16.rows_in_fp8 == (
            form == "fp8-rows"
        )


def test_the_command_runs_on_a_mesh(tmp_path: pathlib.Path) -> None:
    from tests.parity import __main__ as command

    args = command.parsed(["--checkpoint", str(CHECKPOINT), "--out", str(tmp_path), "--mesh", "context=2,expert=2"])
    found = command.cases_of(args, Qwen3MoeConfig.from_pretrained(CHECKPOINT))
    assert {case.mesh for case in found} == {"context=2,expert=2"}


def test_results_are_json(tmp_path: pathlib.Path) -> None:
    """Figures of a model without routing can also be written and read."""
    folder = cases.write_odd_checkpoint(tmp_path / "model", "all_dense")
    batch = str(write_batch(tmp_path / "batch", cases.random_batch(config_of("all_dense"), rows=1, length=16)))
    case = Case("dense", str(folder), "float32", batch, runs=("free",))
    plan = Plan(tmp_path / "run", "cpu", (case,), sides=("exact", "transformers"))
    engine.run(plan)
    write_results(plan, [evaluate(plan, case)])
    (result,) = json.loads((plan.folder / RESULTS).read_text())["cases"]
    assert max(result["figures"]["runs"]["transformers"]["free"]["exact"]["hidden"]) <= bound("parity_fp32")
    assert [line for line in failures(result) if "without arrays" in line]  # two sides are missing, and reported


def test_odd_configurations_are_enough() -> None:
    assert len(ODD) >= 8 and set(ODD) <= set(CONFIGS)
