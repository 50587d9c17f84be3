import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rdfkern.models.checkpoint import read_json
from rdfkern.models.evaluate import EvaluateConfig, main, run_evaluation
from rdfkern.models.metrics import weighted_f1
from rdfkern.models.predict import predict
from rdfkern.models.runs import load_data, load_model
from rdfkern.models.sweep import noise_sweep, sweep_csv, sweep_table, with_noise
from rdfkern.models.train import run_training

CPU = torch.device("cpu")


@pytest.fixture
def trained(tiny_run):
    config = tiny_run(epochs=2)
    return config, run_training(config)


def test_the_report_is_that_of_the_training(trained):
    config, report = trained
    found = run_evaluation(EvaluateConfig(config.folder, device="cpu"))
    assert found["results"] == report["results"]
    assert found["provenance"] == report["provenance"]
    assert read_json(config.folder / "evaluate-test" / "report.json") == found
    assert read_json(config.folder / "report.json") == report

    other = run_evaluation(EvaluateConfig(config.folder, split="validation", device="cpu"))
    best = report["about"]["training"]["validation_weighted_f1"]
    assert other["results"]["network"]["weighted_f1"] == pytest.approx(best)


def test_predictions_do_not_depend_on_the_batches(trained):
    config, _ = trained
    model = load_model(config.folder)
    corpus = load_data(config)
    model.network.train()
    found = [
        predict(
            model.network,
            corpus.splits["test"],
            model.dims,
            model.vocabulary,
            device=CPU,
            batch_utterances=budget,
        )
        for budget in (1, 1000)
    ]
    assert [len(part) for part in found[0]] == [len(d) for d in corpus.splits["test"]]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.network.training


def test_noise_has_the_power_that_was_asked_for(trained):
    config, _ = trained
    dialogues = load_data(config).splits["train"]
    shifted = [
        replace(d, features={n: 3 * f + 100 for n, f in d.features.items()}) for d in dialogues
    ]
    for ratio in (-10.0, 0.0, 20.0):
        noisy = with_noise(shifted, ["audio"], ratio, 0, 0)
        clean = np.concatenate([d.features["audio"] for d in shifted])
        noise = np.concatenate([d.features["audio"] for d in noisy]) - clean
        power = clean.var(0).mean() / (noise.astype(np.float64) ** 2).mean()
        assert 10 * math.log10(power) == pytest.approx(ratio, abs=0.6)
        for before, after in zip(shifted, noisy, strict=True):
            np.testing.assert_array_equal(before.features["text"], after.features["text"])
            assert after.features["audio"].dtype == np.float32
    unchanged = with_noise(shifted, ["audio"], math.inf, 0, 0)[0].features["audio"]
    np.testing.assert_array_equal(unchanged, shifted[0].features["audio"])


def test_noise_is_seeded_and_paired(trained):
    dialogues = load_data(trained[0]).splits["test"]

    def noise(ratio, seed, draw, modalities=("audio",)):
        noisy = with_noise(dialogues, modalities, ratio, seed, draw)
        return noisy[0].features["audio"] - dialogues[0].features["audio"]

    np.testing.assert_array_equal(noise(0, 0, 0), noise(0, 0, 0))
    np.testing.assert_array_equal(noise(0, 0, 0), noise(0, 0, 0, ("visual", "audio")))
    np.testing.assert_allclose(noise(0, 0, 0) * 10, noise(-20, 0, 0), rtol=1e-3, atol=1e-4)
    assert not np.allclose(noise(0, 0, 0), noise(0, 0, 1))
    assert not np.allclose(noise(0, 0, 0), noise(0, 1, 0))


def test_sweep_scores_each_ratio(trained):
    config, report = trained
    model, corpus = load_model(config.folder), load_data(config)
    settings = {"device": CPU, "batch_utterances": 100}
    curve = noise_sweep(model, corpus, "test", [-10.0, math.inf], draws=3, **settings)
    assert [len(values) for values in curve.values()] == [3, 1]
    clean = report["results"]["network"]["weighted_f1"]
    assert curve[math.inf] == [pytest.approx(clean)]
    noisy = with_noise(corpus.splits["test"], ["audio", "visual"], -10.0, 0, 2)
    guesses = predict(model.network, noisy, model.dims, model.vocabulary, **settings)
    labels = np.concatenate([d.labels for d in noisy])
    assert curve[-10.0][2] == pytest.approx(weighted_f1(labels, np.concatenate(guesses)))
    for names in (["smell"], []):
        with pytest.raises(ValueError, match="noisy must name modalities of the network"):
            noise_sweep(model, corpus, "test", [0.0], modalities=names, **settings)


def test_sweep_files():
    curves = {"a": {-5.0: [0.1, 0.2], math.inf: [0.5]}, "b": {-5.0: [0.3, 0.3], math.inf: [0.6]}}
    table = sweep_table(curves)
    assert "15.0 ± 7.1" in table and "no noise" in table and "60.0" in table
    assert sweep_csv(curves).splitlines()[1:3] == ["a,-5,0,0.100000", "a,-5,1,0.200000"]


def test_sweep_command_compares_two_runs(tiny_run, trained, capsys):
    config, _ = trained
    plain = tiny_run("plain", network={"denoise": "plain"}, epochs=1)
    run_training(plain)
    capsys.readouterr()
    arguments = [config.folder, "--beside", plain.folder, "--sweep", "--draws", "2"]
    arguments += ["--snr", "-10", "20", "inf", "--noisy", "audio", "--device", "cpu"]
    arguments += ["--out", config.folder.parent / "compared"]
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert "| SNR (dB) |" in printed and "no noise" in printed and "plain" in printed
    folder = config.folder.parent / "compared"
    assert len((folder / "sweep.csv").read_text().splitlines()) == 1 + 2 * (2 + 2 + 1)
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_errors_are_one_line(trained, tiny_run, tmp_path, capsys):
    config, _ = trained

    def message(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        text = capsys.readouterr().err.strip()
        assert text.startswith("error:") and "\n" not in text
        return text

    assert "holds no run" in message(tmp_path / "nowhere")
    assert "nothing" in message(config.folder, "--data", tmp_path / "nothing")
    path = config.folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    assert "model.safetensors is damaged" in message(config.folder)
    path.unlink()
    assert "is not finished" in message(config.folder)


def test_other_data_must_fit(trained):
    config, _ = trained
    model = load_model(config.folder)
    corpus = load_data(config)
    wide = replace(
        corpus,
        splits={
            split: tuple(
                replace(d, features={**d.features, "audio": np.zeros((len(d), 9), np.float32)})
                for d in found
            )
            for split, found in corpus.splits.items()
        },
    )
    with pytest.raises(ValueError, match=r"takes feature widths .*'audio': 6.*has .*'audio': 9"):
        model.check(wide)
    with pytest.raises(ValueError, match="knows labels"):
        model.check(replace(corpus, labels=corpus.labels[::-1]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("snr", (math.nan,)), ("snr", (-math.inf,)), ("snr", ()), ("draws", 0), ("threads", 0)],
)
def test_settings_that_are_not_allowed_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"^{field} must"):
        EvaluateConfig(tmp_path, **{field: value})
    with pytest.raises(ValueError, match="needs --sweep"):
        EvaluateConfig(tmp_path, beside=tmp_path)
