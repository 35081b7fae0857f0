"""Every loss on a fake GPU: no mix of devices, no wait of the host, gradients in the logits' precision."""

from __future__ import annotations

import pytest

from test_code.fake_gpu import jobs_losses as jobs

pytestmark = pytest.mark.cpu

DIRECTIONS = ("forward", "reverse", "jsd")
TP = (1, 2)
MIX, WAIT = "FakeTensorDeviceMismatchError", "HostSync"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("mix", MIX),
        ("item", WAIT),
        ("float", WAIT),
        ("bool", WAIT),
        ("cpu", WAIT),
        ("tolist", WAIT),
        ("to", WAIT),
        ("copy_", WAIT),
        ("equal", WAIT),
        ("nonzero", WAIT),
        ("mask", WAIT),
        ("index of the host", WAIT),
        ("upload", WAIT),
        ("item in inference mode", WAIT),
        ("upload in inference mode", WAIT),
    ],
)
def test_faults_are_seen(gpu, fault, error):
    assert gpu(jobs.control, fault) == error


def test_work_on_the_device_is_not_a_fault(gpu):
    gpu(jobs.allowed)


def test_waits_can_be_counted_and_read_that_all_is_well(gpu):
    waits, read = gpu(jobs.counted)
    assert len(waits) == len(read)
    assert read == [False, False, 0.0, True, [True], [0.0, 0.0]]


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("options", [{}, {"topk": 16}, {"reuse_teacher": True}, {"in_place": True}])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence(gpu, direction, options, tp):
    gpu(jobs.divergence, direction, tp, **options)


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalized_divergence(gpu, beta, tp):
    gpu(jobs.divergence, "jsd", tp, beta=beta)
    gpu(jobs.divergence, "jsd", tp, beta=beta, topk=16)


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("options", [{}, {"topk": 4}, {"in_place": True}])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_recorded_divergence(gpu, direction, options, tp):
    gpu(jobs.recorded, direction, tp, **options)


@pytest.mark.parametrize("tp", TP)
def test_recorded_logits_are_copied_without_a_wait(gpu, tmp_path, tp):
    gpu(jobs.read_record, str(tmp_path), tp)


def test_a_recording_copies_three_tensors(gpu, tmp_path):
    """Entries, values and the rest are copied to the host to be written; nothing else waits."""
    assert gpu(jobs.waits_of_recording, str(tmp_path)) == ["add"] * 3


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    ("direction", "options"),
    [
        *((direction, {}) for direction in DIRECTIONS),
        ("forward", {"topk": 16}),
        ("forward", {"student_cap": 30.0, "teacher_cap": 20.0}),
        ("jsd", {"topk": 16}),
        ("jsd", {"beta": 0.3}),
    ],
)
def test_fused_losses(gpu, direction, options, labels, tp):
    gpu(jobs.fused, direction, tp, labels, **options)


@pytest.mark.parametrize("tp", TP)
def test_sorted_probabilities(gpu, tp):
    """The tokens to compare are chosen on the host, from the batch that it has read."""
    gpu(jobs.sorted_distances, tp)


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("deferred", [False, True])
def test_metrics_of_a_logging_step(gpu, deferred, tp):
    gpu(jobs.observed_metrics, tp, deferred)


@pytest.mark.parametrize(
    "options", [{}, {"skip_original_loss": True}, {"weights": {"kd_logits": 0.5}}, {"kd_loss_scale": 2.0}]
)
def test_balancer(gpu, options):
    gpu(jobs.balancer, **options)
