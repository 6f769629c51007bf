from gddlab.probing.inputs import Inputs
from tests.probing.networks import tiny


def test_parts_of_noise_levels_and_passes(pictures):
    inputs = Inputs(tiny(), [5.0, 4.0, 3.0, 2.0, 1.0], data=pictures, n=7)
    assert inputs.split(100) == ([[5.0, 4.0, 3.0, 2.0, 1.0]], [(0, 7)])
    assert inputs.split(10)[1] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert inputs.split(3) == ([[5.0, 4.0, 3.0], [2.0, 1.0]], [(i, i + 1) for i in range(7)])
    assert inputs.split(4, group=2) == ([[5.0, 4.0], [3.0, 2.0], [1.0]], [(0, 2), (2, 4), (4, 6), (6, 7)])
    assert inputs.split(1, group=2)[1][0] == (0, 2)
