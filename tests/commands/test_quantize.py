"""`bkcore quantize` as a command: what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from bkcore.cli import app
from bkcore.commands.quantize_steps import run_quantize
from bkcore.evaluation.checkpoints import load_checkpoint
from tests.commands.quantizing import QUIET, settings


def test_the_command_names_both_folders_once(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out, control = str(tmp_path / "int8"), str(tmp_path / "control")
    how = ["--mode", "qat_int8", "--steps", "1", "--calibration-tokens", "64", "--data", str(text)]
    result = CliRunner().invoke(app, ["quantize", str(checkpoint), out, *how, "--control", control])
    assert result.exit_code == 0, result.output
    assert result.output.count(f"Checkpoint: {out}\n") == 1
    assert result.output.count(f"Control: {control}\n") == 1


def test_the_command_says_what_it_read_and_what_it_wrote(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    few = ["--calibration-tokens", "10", "--data", str(text)]  # a window has 32
    command = ["quantize", str(checkpoint), str(tmp_path / "int8"), *few]
    output = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert f"Calibrated on 32 tokens of {text.name}\n" in output
    written = ("config.json", "generation_config.json", "model.safetensors")
    size = sum((tmp_path / "int8" / name).stat().st_size for name in written)
    in_float32 = 4 * load_checkpoint(checkpoint)[0].num_parameters()
    line = f"Size: {size / 1e6:.2f} MB, {size / in_float32:.1%} of the {in_float32 / 1e6:.2f} MB"
    assert line in output
    receipt = CliRunner().invoke(app, ["receipt", str(tmp_path / "int8")], catch_exceptions=False)
    assert line in receipt.output


def test_the_frontier_goes_from_small_to_good(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(checkpoint), str(tmp_path / "out"), "--data", str(text)]
    arguments += ["--group-size=8", "--calibration-tokens=512", "--max-ppl-increase=1%"]
    picture, report = tmp_path / "frontier.svg", tmp_path / "report.json"
    arguments += ["--frontier", str(picture), "--json", str(report)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"<?xml")
    points = json.loads(report.read_text())["points"]
    assert points[0]["name"] == "saved"
    assert points[0]["ci_high_pct"] <= 1
    line = [point for point in points if point["name"] == "budget"]
    assert [point["bytes"] for point in line] == sorted(point["bytes"] for point in line)
    # All in 4 bits and all in 16 but the core. The model is not trained, so that rounding may make
    # it better or worse, but fewer bits change it more.
    assert abs(line[0]["delta_pct"]) > abs(line[-1]["delta_pct"])
    assert {point["name"] for point in points[-3:]} == {"ptq_int8", "ptq_int4", "mixed_precision"}


def test_the_receipt_is_printed(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    run_quantize(checkpoint, tmp_path, text, settings(mode="mixed_precision"), QUIET)
    output = CliRunner().invoke(app, ["receipt", str(tmp_path)], catch_exceptions=False).output
    for part in ("0.experts.1.down", "product", "0.found.imag", "router: small", "asym."):
        assert part in output


def test_the_summary_is_short_and_the_tables_are_for_who_asks(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "int4"
    command = ["quantize", str(checkpoint), str(folder), "--data", str(text), "--group-size=8"]
    command += ["--mode=ptq_int4", "--calibration-tokens=512"]

    def run(*more: str) -> list[str]:
        done = CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
        return [" ".join(line.split()) for line in done.output.splitlines()]

    short = run()
    summary = short[short.index(next(line for line in short if line.startswith("ptq_int4: "))) :]
    assert len(summary) <= 15
    rows = ("embedding and head INT4, groups of 8 1 ", "experts float16, under 2,048 numbers 4 ")
    assert all(any(line.startswith(row) for line in summary) for row in rows)
    assert any(line.startswith("activations of the core INT4 ") for line in summary)
    line = next(line for line in summary if line.startswith("Float in every mode: "))
    assert line.endswith("(norm, chain of a head, short convolution, features, router)")
    assert f"Its cost: bkcore evaluate {folder} --reference {checkpoint} --data {text}" in summary
    assert f"Each tensor: bkcore receipt {folder}" in summary

    long = run("--verbose", "--min-size=0")
    assert any(line.startswith("0.experts.0.up 4 ") for line in long)
    done = CliRunner().invoke(app, ["receipt", str(folder)], catch_exceptions=False)
    receipt = [" ".join(line.split()) for line in done.output.splitlines() if line.strip()]
    assert set(receipt) <= set(long)
    assert not set(receipt) <= set(run("--min-size=0"))


def test_the_summary_of_a_budget_says_what_it_costs(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    command = ["quantize", str(checkpoint), str(tmp_path / "out"), "--data", str(text)]
    command += ["--group-size=8", "--calibration-tokens=512", "--target-bits=7"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    line = "Perplexity on held-out training text: "
    assert done.output.count(line) == 1
    tables = (
        "sensitivity: effect of quantizing one unit alone",
        "size and perplexity on held-out windows",
    )
    assert not any(title in done.output for title in tables)
    done = CliRunner().invoke(app, [*command, "--verbose"], catch_exceptions=False)
    assert all(title in done.output for title in tables)


def test_what_calibration_did_not_reach_is_a_warning(
    one_sided: Path, text: Path, tmp_path: Path
) -> None:
    command = ["quantize", str(one_sided), str(tmp_path / "out"), "--data", str(text)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    printed = " ".join(done.output.split())
    assert "warning: no calibration data reached layers.0.experts.experts.1.up" in printed
    assert "and 1 more like this; --strict refuses such a model" in printed


def test_a_model_that_is_replaced_is_named_before(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    command = ["quantize", str(checkpoint), str(tmp_path / "int8"), "--data", str(text)]
    first, second = (
        CliRunner().invoke(app, command, catch_exceptions=False).output for _ in range(2)
    )
    line = (
        f"{tmp_path / 'int8'} holds an earlier model, to be replaced when the new one is complete\n"
    )
    assert line not in first
    assert second.startswith(line)
