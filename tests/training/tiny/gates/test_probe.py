import torch

from training.tiny.gates.probe import fit_probe


def test_a_probe_tells_apart_what_a_line_tells_apart() -> None:
    features = torch.tensor([[-2.0, 0.3], [-1.0, -0.2], [1.0, 0.1], [2.0, -0.4]])
    probe = fit_probe(features, torch.tensor([0, 0, 1, 1]), 2)
    assert probe.predict(torch.tensor([[-0.6, 0.0], [0.6, 0.0]])).tolist() == [0, 1]
