import dataclasses

import numpy as np
import pytest

from rdfkern.models import study as study_module
from rdfkern.models.checkpoint import read_json
from rdfkern.models.runs import load_model
from rdfkern.models.study import StudyConfig, format_study, main, run_study

PLAIN = {field.name for field in dataclasses.fields(StudyConfig)}


@pytest.fixture
def tiny_study(tiny_run):
    def make(**changes) -> StudyConfig:
        run = tiny_run("study", epochs=1)
        settings = {name: getattr(run, name) for name in PLAIN if hasattr(run, name)}
        return StudyConfig(**settings | changes)

    return make


def test_variants_change_one_part(tiny_study):
    config = tiny_study()
    full = config.run("full", 3)
    assert full.seed == 3 and full.folder == config.out / "full-seed3"
    expected = {
        "no-differential": ("denoise", "plain"),
        "no-relations": ("relations", "off"),
        "no-diffusion": ("fusion", "gate"),
    }
    for variant, (part, value) in expected.items():
        found = config.run(variant, 3)
        assert found.network == dataclasses.replace(full.network, **{part: value})
        assert dataclasses.replace(found, network=full.network, out=full.out) == full
    assert config.run("text-only", 3).modalities == ("text",)


def test_study_tabulates_and_reuses_runs(tiny_study, monkeypatch, capsys):
    variants = ("full", "no-differential", "text-only", "linear")
    config = tiny_study(variants=variants, seeds=(0, 1), sweep=True, draws=1)
    study = run_study(config)
    assert list(study["variants"]) == list(variants)
    for variant in variants[:3]:
        row = study["variants"][variant]
        reports = [read_json(config.run(variant, s).folder / "report.json") for s in (0, 1)]
        scores = [report["results"]["network"]["weighted_f1"] for report in reports]
        assert list(row["scores"].values()) == scores
        assert row["mean"] == pytest.approx(np.mean(scores))
        assert row["deviation"] == pytest.approx(np.std(scores, ddof=1))
        full = list(study["variants"]["full"]["scores"].values())
        assert row["differences"] == pytest.approx(np.subtract(scores, full).tolist())
    linear = reports[0]["results"]["linear"]["weighted_f1"]
    assert linear != study["variants"]["linear"]["mean"]  # text alone against all modalities
    report = read_json(config.run("full", 0).folder / "report.json")
    assert study["variants"]["linear"]["mean"] == report["results"]["linear"]["weighted_f1"]
    assert list(load_model(config.run("text-only", 0).folder).dims) == ["text"]
    assert study == read_json(config.study_folder / "study.json")
    written = (config.study_folder / "study.md").read_text()
    assert format_study(study) in written and "no noise" in written
    assert written.strip() in capsys.readouterr().out
    clean = [study["sweep"]["full"]["inf"]]
    assert clean == [pytest.approx(list(study["variants"]["full"]["scores"].values()))]

    trained = []
    run_training = study_module.run_training

    def counted(run, corpus):
        trained.append((run.folder / "report.json").exists())
        return run_training(run, corpus)

    monkeypatch.setattr(study_module, "run_training", counted)
    assert run_study(config) == study
    assert trained == [True] * 6


def test_study_command(tiny_arguments, tmp_path, capsys):
    arguments = [*tiny_arguments, "--epochs", "1", "--out", str(tmp_path / "study")]
    arguments += ["--variants", "full", "no-relations", "--seeds", "4"]
    assert main(arguments) == 0
    assert "| no-relations" in capsys.readouterr().out
    assert (tmp_path / "study" / "no-relations-seed4" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("linear",)}, "variants must contain 'full'"),
        ({"variants": ("full", "full")}, "variants must be distinct"),
        ({"seeds": ()}, "seeds must be distinct and at least one"),
        ({"seeds": (-1,)}, "seeds must be at least 0"),
        ({"draws": 0}, "draws must be"),
        ({"variants": ("full",), "sweep": True}, "sweep compares"),
        ({"epochs": 0}, "epochs must be"),
    ],
)
def test_settings_that_are_not_allowed_are_named(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        StudyConfig(**changes)


def test_a_study_under_torchrun_is_refused(tiny_study, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        run_study(tiny_study())
