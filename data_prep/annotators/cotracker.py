"""Points followed by CoTracker (Karaev et al., 2024), which comes with its own code."""

from pathlib import Path

import torch
from torch import Tensor


class CoTracker:
    """CoTracker's offline model as a data_prep.annotators.tracks.Tracker: it sees the whole clip at once.

    torch.hub runs the code of the repository: take one that you trust.

    Args:
        repo: "owner/name:commit" on GitHub, or a folder with hubconf.py.
        model: a function of hubconf.py. The model that it gives is called with `video` (1, T, 3, H, W) of 0..255,
            `queries` (1, N, 3) of (frame, x, y) and backward_tracking=True, and answers with tracks (1, T, N, 2) and
            visibility (1, T, N).

    Raises:
        FileNotFoundError: there is no such folder, or GitHub or the hub does not answer.
        ValueError: the repository has no such model.
    """

    def __init__(self, *, repo: str = "facebookresearch/co-tracker", model: str = "cotracker3_offline") -> None:
        local = Path(repo).is_dir()
        try:
            network = torch.hub.load(repo, model, source="local" if local else "github", trust_repo=True)
        except RuntimeError as error:
            raise ValueError(
                f"pictures.tracker.tracker.repo={repo}: expected a model {model}, found {error}"
            ) from error
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"pictures.tracker.tracker.repo={repo}: expected a repository with hubconf.py, found {error}: "
                "give the folder of a copy"
            ) from error
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.eval().to(self.device)

    @torch.no_grad()
    def track(self, video: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """See Tracker; raises ValueError where the model answers with other shapes."""
        clip = video[None].float().to(self.device)
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            tracks, visible = self.network(clip, queries=queries[None].to(self.device), backward_tracking=True)
        expected = (1, len(video), len(queries))
        if (*tracks.shape, *visible.shape) != (*expected, 2, *expected):
            found = f"{tuple(tracks.shape)} and {tuple(visible.shape)}"
            raise ValueError(f"tracker: expected tracks {(*expected, 2)} and visibility {expected}, found {found}")
        return tracks[0].float().cpu(), visible[0].bool().cpu()
