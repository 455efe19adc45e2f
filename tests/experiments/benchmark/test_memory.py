from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.benchmark.architectures import make_autoencoder
from experiments.benchmark.memory import Jobs, held_memory

GB = 2**30


def test_what_is_alive_is_counted_once():
    weights = torch.ones(1000)
    with held_memory([weights]) as held:
        first = torch.zeros(1000)
        second = first + weights
        view = second.view(10, 100)
        del first, second
        assert (held.now, held.peak, held.largest) == (4000, 8000, 4000), "a view keeps what it looks at"
        assert weights.view(10, 100).shape and held.now == 4000, "weights are no new memory, nor is a view of them"
        del view
        assert held.now == 0
        x = torch.zeros(1000, requires_grad=True)
        loss = (2 * x).exp().sum()
        assert held.now == 4000 + 4000 + 4, "x, the exponential that its gradient needs, and the sum"
        loss.backward()
        del loss
        assert held.now == 4000 + 4000, "x and its gradient"


@pytest.mark.parametrize(("side", "images", "limit"), [(512, 10, 1.0), (1024, 2, 3.5)])
def test_large_images_pass_the_autoencoder_one_by_one(side, images, limit):
    with FakeTensorMode(), torch.no_grad():
        vae = make_autoencoder("sdxl").eval().requires_grad_(False)
        peaks = []
        for sliced in (False, True):
            (vae.enable_slicing if sliced else vae.disable_slicing)()
            for run, shape in ((vae.encode, (3, side, side)), (vae.decode, (4, side // 8, side // 8))):
                with held_memory(vae.parameters()) as held:
                    run(torch.zeros(images, *shape))
                peaks.append(held.peak / GB)
    # Beside one image's work there are the images and the latents of all.
    assert max(peaks[2:]) < limit and all(peaks[i + 2] < 1.3 * peaks[i] / images for i in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "limit"), [("sd15", 11), ("sd21", 22), ("sdxl", 22), ("pixart", 22)])
def test_a_world_fits_the_card(root: Path, world: str, limit: float):
    """12 GB at 512 px, else 24, of which a GB or two is left to the kernels."""
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        jobs = Jobs(compose("memory", [f"world={world}"]))
    for job, peak in jobs.peaks().items():
        assert (jobs.weights + peak) / GB < limit, job
