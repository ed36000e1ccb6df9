# SPDX-License-Identifier: Apache-2.0
"""One case through the engine: what moves, what stays, what is refused, and every way to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samda.adaptation.engine import Adaptation
from samda.adaptation.loop import NotFinite, OutOfTime
from samda.adaptation.record import validate_record
from samda.adapters.attach import SCOPES, scope_parameters
from samda.adapters.base import base_parameters
from samda.errors import AdapterError, InputError
from samda.inference.predict import Predictor
from samda.networks.segmenter import SamSegmenter
from samda.provenance import sha256_of
from samda.source_statistics import box_of, feature_statistics
from samda.views import apply_view
from tests.adaptation.conftest import ALWAYS, TASK, build, save, scan, slices_of
from tests.conftest import TINY_TINYVIT

NEVER_SKIP = {"skip_agreement": 2.0}


@pytest.fixture
def case(scans: Path) -> Path:
    return scans / "images" / "case2.nii.gz"


def snapshot(network: SamSegmenter) -> dict[str, torch.Tensor]:
    network.full_state_dict = True
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.full_state_dict = False
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in ("time_start", "time_end", "seconds")}


# ------------------------------------------------------------------------------------------------- nothing left behind


@pytest.mark.parametrize("method", ["tent", "default"])
def test_every_tensor_returns_bit_for_bit(
    make_adaptation: Callable, network: SamSegmenter, case: Path, method: str
) -> None:
    before = snapshot(network)
    result = make_adaptation(method=method, lr=0.05, guard=NEVER_SKIP).adapt(case)
    assert max(result.record["param_displacement"]) > 0  # something did move meanwhile
    assert same(before, snapshot(network))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_every_tensor_returns_after_an_exception(
    make_adaptation: Callable,
    network: SamSegmenter,
    case: Path,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, flags = snapshot(network), [p.requires_grad for p in network.parameters()]
    adaptation = make_adaptation(guard=NEVER_SKIP)
    real, calls = adaptation.objective.loss, []

    def loss(logits: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 3:
            raise error("in the middle")
        return real(logits)

    object.__setattr__(adaptation.objective, "loss", loss)
    if error is RuntimeError:
        assert adaptation.adapt(case).record["reason"] == "fallback_error"
    else:
        with pytest.raises(error):
            adaptation.adapt(case)
    assert same(before, snapshot(network)) and flags == [p.requires_grad for p in network.parameters()]
    assert all(p.grad is None for p in network.parameters())


def test_the_order_of_cases_changes_no_byte(make_adaptation: Callable, scans: Path) -> None:
    paths = [scans / "images" / f"case{i}.nii.gz" for i in (2, 3)]
    adaptation = make_adaptation(guard=ALWAYS, lr=0.02, keep="last")
    first = {path: adaptation.adapt(path) for path in paths}
    second = {path: adaptation.adapt(path) for path in reversed(paths)}
    for path in paths:
        assert first[path].labels.tobytes() == second[path].labels.tobytes()
        assert first[path].uncertainty.tobytes() == second[path].uncertainty.tobytes()
        assert without_times(first[path].record) == without_times(second[path].record)


def test_only_the_scope_moves(make_adaptation: Callable, network: SamSegmenter, case: Path) -> None:
    gate = make_adaptation(scope="gate", guard=NEVER_SKIP)
    decoder = make_adaptation(scope="decoder", guard=NEVER_SKIP)
    assert gate.adapt(case).record["parameters_moved"] == 131_074  # two gates, two 256 x 256 maps
    assert decoder.adapt(case).record["parameters_moved"] == 395_522
    moving = set(decoder.parameters)
    assert moving.isdisjoint(base_parameters(network)) and moving.isdisjoint(network.head_params())
    prepared = decoder.prepare(case)
    run = decoder.optimize(prepared)
    assert set(run.tensors) == moving


def test_unknown_or_missing_scopes_are_refused(make_adaptation: Callable) -> None:
    with pytest.raises(AdapterError, match="it has: gate, decoder"):
        make_adaptation(scope="norm")


# -------------------------------------------------------------------------------------------------------- predictions


def test_source_map_is_the_plain_prediction(make_adaptation: Callable, network: SamSegmenter, case: Path) -> None:
    plain = Predictor(network, TASK).predict(case)
    result = make_adaptation(guard=NEVER_SKIP).adapt(case)
    assert plain.labels.tobytes() == result.source.tobytes()
    assert np.array_equal(plain.affine, result.affine) and plain.labels.shape == result.labels.shape
    assert plain.volumes_ml()["liver"] == pytest.approx(result.record["volumes_ml"]["liver"][0], abs=1e-3)


def test_no_steps_return_the_source(make_adaptation: Callable, case: Path) -> None:
    for settings in ({"steps": 0}, {"method": "none", "steps": None}):
        result = make_adaptation(guard=NEVER_SKIP, **settings).adapt(case)
        assert result.record["reason"] == "accepted_unchanged" and result.record["steps_run"] == 0
        assert result.labels.tobytes() == result.source.tobytes() and not result.difference.any()


def test_uncertainty_is_the_normalized_entropy(make_adaptation: Callable, network: SamSegmenter, case: Path) -> None:
    p = Predictor(network, TASK).predict(case, probabilities=True).probabilities
    expected = -(p * np.log(np.maximum(p, 1e-12))).sum(0) / np.log(3)
    result = make_adaptation(steps=0, guard=NEVER_SKIP).adapt(case)
    assert result.uncertainty.dtype == np.float32
    # kept in half precision: half a unit in the last place below 1, and what rounding before that adds
    assert np.allclose(result.uncertainty, expected, rtol=0, atol=2**-12 + 1e-5)
    assert result.uncertainty.min() >= 0 and result.uncertainty.max() <= 1


def test_difference_map(make_adaptation: Callable, case: Path) -> None:
    result = make_adaptation(steps=0).adapt(case)
    result.source = np.array([[[0, 1, 1, 2, 0]]], np.uint8)
    result.labels = np.array([[[0, 0, 2, 2, 1]]], np.uint8)
    assert result.difference.tolist() == [[[0, 1, 3, 0, 2]]]


def test_cached_and_uncached_runs_agree(make_adaptation: Callable, case: Path) -> None:
    cached = make_adaptation(guard=ALWAYS, lr=0.02).adapt(case)
    uncached = make_adaptation(guard=ALWAYS, lr=0.02, memory_mb=0.0).adapt(case)
    assert cached.labels.tobytes() == uncached.labels.tobytes()
    assert cached.record["loss"] == uncached.record["loss"]


def test_chunks_of_a_large_case_give_the_same_gradients(
    make_adaptation: Callable, case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a smooth objective: where absolute values meet Adam's sign-like first steps, rounding decides single parameters
    adaptation = make_adaptation(method="class_entropy", guard=NEVER_SKIP)
    prepared = adaptation.prepare(case)
    whole = adaptation.optimize(prepared)
    monkeypatch.setattr("samda.adaptation.case.GRADIENT_PIXELS", 5 * 16)  # five slices of 4 x 4 at a time
    parts = adaptation.optimize(prepared)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)


def test_encoder_scope_encodes_at_every_step(tiny_tinyvit_weights: Path, trained: tuple, case: Path) -> None:
    network = build(tiny_tinyvit_weights, lora={"rank": 2})
    state = network.state_dict() | trained[0]
    network.load_state_dict(state)
    adaptation = Adaptation(
        network, TASK, trained[1], scope="decoder+encoder", steps=2, views=2, slices=2, guard=NEVER_SKIP
    )
    before = snapshot(network)
    result = adaptation.adapt(case)
    assert result.record["error"] is None and result.record["steps_run"] == 2
    assert not adaptation.embedded and same(before, snapshot(network))


def test_levels_are_aligned_before_the_steps(tiny_tinyvit_weights: Path, trained: tuple, scans: Path) -> None:
    """The default model of `samda train`, started in closed form, on a scan of another intensity range."""
    network = SamSegmenter(TINY_TINYVIT, 3, weights=tiny_tinyvit_weights, adapters=["ssf"], head="pyramid")
    images, labels = slices_of(*(scans / kind / "case0.nii.gz" for kind in ("images", "labels")))
    network.fit_closed_form([(images, labels[:, None])], torch.bincount(labels.flatten()))
    items = [{"image": image, "label": label[None]} for image, label in zip(images, labels, strict=True)]
    moments = feature_statistics(network, TASK, items, range(len(items)))
    record = {"statistics": trained[1]["statistics"] | moments}
    small = {"views": 2, "slices": 3, "steps": 2, "guard": ALWAYS}
    before, adaptation = snapshot(network), Adaptation(network, TASK, record, **small)
    assert adaptation.settings.scope == "ssf"
    assert list(adaptation.rates.values()) == 6 * [pytest.approx(10 * 6e-4)]
    prepared = adaptation.prepare(scans / "images" / "case2.nii.gz")
    for name in network.head.levels:
        prepared.inputs[name] = 1.5 * prepared.inputs[name] + 0.3
    run = adaptation.optimize(prepared)
    assert len(run.loss) == 1 + 2 + 2
    assert 0 == run.displacement[0] < run.displacement[1] < run.displacement[2]
    assert run.drift[2] < run.drift[1] < run.drift[0]
    assert adaptation.adapt(scans / "images" / "case2.nii.gz").record["error"] is None
    assert same(before, snapshot(network))
    plain = Adaptation(network, TASK, {"statistics": record["statistics"] | {"levels": None}}, **small)
    assert len(plain.optimize(prepared).loss) == 1 + 2


def test_norm_scope(tiny_tinyvit_weights: Path, trained: tuple, case: Path) -> None:
    network = build(tiny_tinyvit_weights, norm={})
    network.load_state_dict(network.state_dict() | trained[0])
    adaptation = Adaptation(network, TASK, trained[1], scope="norm", method="tent", steps=1, views=1, guard=NEVER_SKIP)
    result = adaptation.adapt(case)
    assert result.record["param_displacement"][1] > 0 and result.record["error"] is None
    assert all(".adapters.norm." in name for name in adaptation.parameters)


@pytest.mark.parametrize("scope", [*SCOPES[2:], "gate+norm", "decoder+encoder", "+".join(SCOPES[2:])])
def test_scopes_and_combinations_are_adapted_and_recorded(
    tiny_tinyvit_weights: Path, trained: tuple, case: Path, scope: str
) -> None:
    network = build(tiny_tinyvit_weights, salt={"rank": 2}, norm={})
    network.load_state_dict(network.state_dict() | trained[0])
    small = {"method": "tent", "steps": 1, "views": 1, "slices": 1, "guard": NEVER_SKIP}
    backwards = Adaptation(network, TASK, trained[1], scope="+".join([*scope.split("+")[::-1], scope]), **small)
    record = backwards.adapt(case).record
    validate_record(record)
    assert record["error"] is None and record["steps_run"] == 1 and record["scope"] == scope
    assert record["parameters_moved"] == sum(p.numel() for p in scope_parameters(network, scope).values())
    assert record["config_sha256"] == sha256_of(Adaptation(network, TASK, trained[1], scope=scope, **small).config)


def test_flips_are_mapped_back(make_adaptation: Callable, network: SamSegmenter, case: Path) -> None:
    adaptation = make_adaptation(views=3, flips=True)
    adaptation.inferer.amp = "off"
    prepared = adaptation.prepare(case)
    assert [view.flip for view in prepared.views] == [False, True, False]
    images = prepared.grid.extract(prepared.data["image"], prepared.slices)
    with torch.no_grad():
        found = adaptation.logits(prepared)
        mirrored = network.decode(network.encode(apply_view(prepared.views[1], images, prepared.slices)))
    # other batches, other rounding: logits of about 1 may differ by a few 1e-5
    torch.testing.assert_close(
        found[1], mirrored.flip(-1), rtol=1e-4, atol=1e-4
    )  # liver and spleen have no twin of the other side
    torch.testing.assert_close(found[0], network.decode(network.encode(images)), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- decisions


def test_a_good_case_is_left_alone(make_adaptation: Callable, case: Path) -> None:
    result = make_adaptation(guard={"skip_agreement": 0.5, "skip_plausibility": 0.5}).adapt(case)
    assert result.record["reason"] == "skipped_quality" and result.record["decision"] == "skipped"
    assert result.labels.tobytes() == result.source.tobytes() and result.record["loss"] == []


def test_nothing_in_sight_is_skipped(
    make_adaptation: Callable, network: SamSegmenter, case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = network.decode
    offset = torch.tensor([100.0, 0.0, 0.0]).view(1, 3, 1, 1)
    monkeypatch.setattr(network, "decode", lambda embedding: blind(embedding) + offset)
    result = make_adaptation().adapt(case)
    assert result.record["reason"] == "skipped_empty" and not result.labels.any()
    assert result.record["volumes_ml"] == {"liver": [0.0, 0.0], "spleen": [0.0, 0.0]}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFinite("loss nan after 2 steps"), "fallback_nonfinite"),
        (OutOfTime("step 3 of 8"), "fallback_timeout"),
        (MemoryError(), "fallback_oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB"), "fallback_oom"),
        (ValueError("something else"), "fallback_error"),
    ],
)
def test_errors_while_adapting_fall_back_to_the_source(
    make_adaptation: Callable, case: Path, error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation = make_adaptation(guard=NEVER_SKIP)

    def fail(prepared: object) -> None:
        raise error

    monkeypatch.setattr(adaptation, "optimize", fail)
    result = adaptation.adapt(case)
    assert result.record["reason"] == code and result.record["decision"] == "fallback"
    assert result.labels.tobytes() == result.source.tobytes() and result.tensors is None
    assert type(error).__name__ in result.record["error"]


def test_a_real_time_limit_and_a_real_divergence(make_adaptation: Callable, case: Path) -> None:
    assert make_adaptation(guard=NEVER_SKIP, time_limit_s=1e-9).adapt(case).record["reason"] == "fallback_timeout"
    diverged = make_adaptation(guard=NEVER_SKIP, lr=1e30, steps=4).adapt(case)
    assert diverged.record["reason"] == "fallback_nonfinite"
    assert diverged.labels.tobytes() == diverged.source.tobytes()


def test_forced_collapse_falls_back(make_adaptation: Callable, case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything background, with perfect certainty: what plain entropy asks for."""
    adaptation = make_adaptation(guard=NEVER_SKIP)
    force(adaptation, monkeypatch, lambda labels: np.zeros_like(labels))
    result = adaptation.adapt(case)
    assert result.record["reason"] == "fallback_vanished"
    assert result.labels.tobytes() == result.source.tobytes()


def test_forced_doubling_falls_back(make_adaptation: Callable, case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adaptation = make_adaptation(guard=NEVER_SKIP)
    force(adaptation, monkeypatch, lambda labels: np.where(np.arange(labels.shape[0])[:, None, None] < 26, 2, labels))
    result = adaptation.adapt(case)
    assert result.record["reason"] in ("fallback_volume", "fallback_plausibility")
    assert result.labels.tobytes() == result.source.tobytes()


def force(adaptation: Adaptation, monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Let the adapted prediction be `change` of the source's, whatever the steps did."""
    real = adaptation.optimize

    def optimize(prepared: object):
        run = real(prepared)
        return dataclasses.replace(run, best_step=len(run.loss) - 1)

    def predict(prepared, tensors):
        labels = change(prepared.source.labels).astype(prepared.source.labels.dtype)
        return dataclasses.replace(prepared.source, labels=labels)

    monkeypatch.setattr(adaptation, "optimize", optimize)
    monkeypatch.setattr(adaptation, "predict", predict)


def test_accepted_cases_give_the_adapted_map(make_adaptation: Callable, case: Path) -> None:
    adaptation = make_adaptation(method="class_entropy", lr=0.02, keep="last", guard=ALWAYS)
    result = adaptation.adapt(case)
    assert result.record["reason"] == "accepted" and result.record["best_step"] == 3
    assert result.labels.tobytes() != result.source.tobytes() and result.difference.any()
    adapted = adaptation.predict(adaptation.prepare(case), result.tensors)
    assert result.labels.tobytes() == adapted.labels.tobytes()  # a RAS file: the axis order is the same
    assert result.record["labels_sha256"]["final"] != result.record["labels_sha256"]["source"]
    dice = result.record["dice_source_adapted"]["liver"]
    a, b = result.source == 1, result.labels == 1
    assert dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)


def test_default_does_no_harm_on_mild_shifts(make_adaptation: Callable, tmp_path: Path) -> None:
    """Gamma and noise on scans like those of the training: no map to use loses more than a hundredth of mean Dice."""
    adaptation = make_adaptation(views=3, slices=3, steps=2, guard=NEVER_SKIP)
    for seed in range(5):
        image, labels = scan(seed)
        rng = np.random.default_rng(seed)
        unit = np.clip(image / 1000, 0, 1) ** rng.uniform(0.7, 1.4) + rng.normal(0, 0.02, image.shape)
        result = adaptation.adapt(save(tmp_path / f"{seed}.nii.gz", (1000 * unit - 1).astype(np.float32)))
        assert mean_dice(result.labels, labels) >= mean_dice(result.source, labels) - 0.01


def mean_dice(prediction: np.ndarray, labels: np.ndarray) -> float:
    pairs = [(prediction == k, labels == k) for k in (1, 2)]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]))


# ------------------------------------------------------------------------------------------------------------- record


def test_the_record_is_valid_and_reproduces_the_map(
    make_adaptation: Callable, network: SamSegmenter, trained: tuple, case: Path
) -> None:
    result = make_adaptation(guard=ALWAYS, lr=0.02, views=3, seed=5, keep="last").adapt(case)
    record = result.record | {"dry_run": False}
    validate_record(record)
    assert "case2" not in str(record) and record["case_id"] == f"case-{record['input_sha256'][:12]}"
    again = Adaptation.from_record(network, TASK, trained[1], record).adapt(case)
    assert again.record["labels_sha256"] == record["labels_sha256"]
    assert without_times(again.record) == without_times(result.record)


def test_another_seed_gives_other_views(make_adaptation: Callable, case: Path) -> None:
    a, b = (make_adaptation(guard=NEVER_SKIP, seed=seed).prepare(case) for seed in (0, 1))
    assert a.seed != b.seed and a.views != b.views


def test_labels_are_not_touched(make_adaptation: Callable, case: Path) -> None:
    adaptation = make_adaptation()
    adaptation.adapt({"image": case, "id": "x", "label": "there is no such file"})


# ------------------------------------------------------------------------------------------------------------ refusals


def test_untrained_models_are_refused(tiny_tinyvit_weights: Path, trained: tuple) -> None:
    fresh = build(tiny_tinyvit_weights)
    with pytest.raises(AdapterError, match="class head was never trained"):
        Adaptation(fresh, TASK, trained[1])
    state = {k: v for k, v in trained[0].items() if ".adapters." not in k}
    fresh.load_state_dict(fresh.state_dict() | state)
    with pytest.raises(AdapterError, match=r"SAM-DA adapter was never trained \(its gates are zero\)"):
        Adaptation(fresh, TASK, trained[1])


def test_a_model_without_statistics_is_refused(network: SamSegmenter) -> None:
    for record in ({}, {"statistics": None}):
        with pytest.raises(InputError, match="no source statistics"):
            Adaptation(network, TASK, record)


def test_statistics_of_other_classes_are_refused(network: SamSegmenter, trained: tuple) -> None:
    classes = {"liver": trained[1]["statistics"]["classes"]["liver"]}
    with pytest.raises(InputError, match="lack the class 'spleen'"):
        Adaptation(network, TASK, {"statistics": trained[1]["statistics"] | {"classes": classes}})


@pytest.mark.parametrize("wrong", ["nan", "channels", "constant"])
def test_unusable_scans_are_refused(make_adaptation: Callable, tmp_path: Path, wrong: str) -> None:
    image, _ = scan(0)
    if wrong == "nan":
        image[0, 0, 0] = np.nan
    elif wrong == "channels":
        image = np.stack([image, image], axis=-1)
    else:
        image[:] = 40
    with pytest.raises(InputError):
        make_adaptation().adapt(save(tmp_path / "wrong.nii.gz", image))


def test_the_kept_iterate_has_nearly_the_highest_merit_which_is_plausibility_squared_times_agreement(
    make_adaptation: Callable, case: Path
) -> None:
    adaptation = make_adaptation(method="class_entropy", lr=0.01, steps=4, views=3, slices=4, guard=NEVER_SKIP)
    prepared = adaptation.prepare(case)
    run = adaptation.optimize(prepared)
    near = [step for step, merit in enumerate(run.merit) if merit >= 0.95 * max(run.merit)]
    assert run.best_step == near[0] and len(set(run.merit)) > 1
    with torch.no_grad():
        logits = adaptation.logits(prepared)
    labels = torch.nn.functional.interpolate(logits[0], prepared.images.shape[-2:], mode="bilinear").argmax(1)
    values = [
        0.3 if v is None else v
        for v in adaptation.judge.plausibility(labels, list(map(box_of, prepared.bodies))).values()
    ]
    views = logits.softmax(2)
    dice = []
    for v in range(3):
        other = (views.sum(0) - views[v]).argmax(1)
        for k in (1, 2):
            a, b = views[v].argmax(1) == k, other == k
            dice.append(2 * float((a & b).sum()) / max(1.0, float(a.sum() + b.sum())))
    assert run.merit[0] == pytest.approx(np.mean(values) ** 2 * np.mean(dice), rel=1e-5)
