"""Runs tests of transformers and PEFT on stock and on patched classes: `python -m tests.peer TRANSFORMERS PEFT`.

Both are folders of source code, of the versions installed. A test that passes on stock classes and not on patched ones
needs a reason in `tests/peer/differences.py`. PEFT's tests get a tiny Qwen3-MoE where they would load another model.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from tests.peer.differences import DIFFERENCES

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TRANSFORMERS_TESTS = "tests/models/qwen3_moe/test_modeling_qwen3_moe.py"
PEFT_TESTS = ("tests/test_target_parameters.py", "tests/test_decoder_models.py")
TINY = "tiny-qwen3-moe"  # replaces the hub's models; relative to the folder in which PEFT's tests run
# what PEFT's tests name -> what their copies name
_SUBSTITUTES = {
    r"trl-internal-testing/tiny-(GptOss|Llama4)ForCausalLM": TINY,
    r"peft-internal-testing/tiny-dummy-qwen2": TINY,
    r"feed_forward\.": "mlp.",
    # for a mixture of experts PEFT turns None into an empty set, and has no module to adapt
    r'"target_modules": None': '"target_modules": ["q_proj", "v_proj"]',
}


def outcomes(folder: pathlib.Path, classes: str, arguments: list[str]) -> dict[str, str]:
    """Test id -> passed, failed or skipped, of pytest in `folder` on `classes`, stock or patched."""
    with tempfile.TemporaryDirectory() as scratch:
        result = pathlib.Path(scratch) / "outcomes.json"
        environment = os.environ | {
            "PEER_CLASSES": classes,
            "PEER_OUTCOMES": str(result),
            "HF_HUB_OFFLINE": "1",
            # the recorder alone of our tests, since those projects have a package `tests` too
            "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        options = ["-q", "-p", "recorder", "-p", "no:cacheprovider", "--tb=line", *arguments]
        with (pathlib.Path(scratch) / "log").open("w+") as log:
            subprocess.run(
                [sys.executable, "-m", "pytest", *options],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                check=False,
            )
            log.seek(0)
            printed = log.read()
        found = json.loads(result.read_text()) if result.exists() else {}
    if not any(outcome == "passed" for outcome in found.values()):
        raise SystemExit(f"{folder}: expected tests that pass on {classes} classes, found none:\n{printed[-3000:]}")
    return found


def peft_copy(checkout: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies PEFT's tests into `folder`, with a tiny Qwen3-MoE in place of the hub's models."""
    from peers.make_checkpoint import TINY as SHAPE
    from peers.make_checkpoint import make_checkpoint

    shutil.copytree(checkout / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "__init__.py").touch()
    for name in PEFT_TESTS:
        text = (folder / name).read_text(encoding="utf-8")
        for pattern, replacement in _SUBSTITUTES.items():
            text = re.sub(pattern, replacement, text)
        (folder / name).write_text(text, encoding="utf-8")
    make_checkpoint(folder / TINY, SHAPE)


def differing(stock: Mapping[str, str], patched: Mapping[str, str]) -> list[str]:
    """The tests that pass on stock classes and not on patched ones."""
    return [test for test, outcome in stock.items() if outcome == "passed" and patched.get(test) != "passed"]


def report(name: str, stock: Mapping[str, str], patched: Mapping[str, str]) -> bool:
    """Prints the tests that differ, with their reasons; whether each has one."""
    passed = [sum(outcome == "passed" for outcome in found.values()) for found in (stock, patched)]
    print(f"{name}: {passed[0]} tests pass on stock classes, {passed[1]} on patched ones")
    complete = True
    for test in differing(stock, patched):
        reason = next((why for end, why in DIFFERENCES.items() if test.endswith(end)), None)
        print(f"  {test}\n    {reason or 'NO REASON in tests/peer/differences.py'}")
        complete = complete and reason is not None
    return complete


def main() -> int:
    """Returns 0 if every test that differs has a reason, otherwise 1; 2 if a folder lacks its tests."""
    parser = argparse.ArgumentParser(prog="python -m tests.peer", description=str(__doc__).split("\n")[0])
    parser.add_argument("transformers", type=pathlib.Path, metavar="TRANSFORMERS", help="folder of its source code")
    parser.add_argument("peft", type=pathlib.Path, metavar="PEFT", help="folder of its source code")
    args = parser.parse_args()
    for folder, test in ((args.transformers, TRANSFORMERS_TESTS), *((args.peft, test) for test in PEFT_TESTS)):
        if not (folder / test).is_file():
            print(f"{parser.prog}: file not found: {folder / test}", file=sys.stderr)
            return 2
    complete = report(
        "transformers", *(outcomes(args.transformers, kind, [TRANSFORMERS_TESTS]) for kind in ("stock", "patched"))
    )
    with tempfile.TemporaryDirectory() as scratch:
        peft_copy(args.peft, pathlib.Path(scratch))
        # models that stay on the hub are left out; so is all of the long grid but LoRA's kinds
        arguments = [*PEFT_TESTS, "-k", f"test_target_parameters or ({TINY} and LoraConfig)"]
        both = [outcomes(pathlib.Path(scratch), kind, arguments) for kind in ("stock", "patched")]
        complete = report("PEFT", *both) and complete
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
