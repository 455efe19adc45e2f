"""The recorded step: an unguided run of a reference picture, whose readouts are kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rg.denoisers import denoiser_of
from rg.energies import head_time
from rg.guided_step import GuidedRun
from rg.hooks import predict
from rg.targets import ReferenceTarget


class RecordingRun(GuidedRun):
    """Stores the readouts of every term with a ReferenceTarget; the denoiser's answers stay its own."""

    def __call__(self, forward: Callable[..., Any], sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        step, total = self._count_step()
        terms = [term for term in self.guidance.terms if isinstance(term.target, ReferenceTarget)]
        if step == 0:
            for term in terms:
                term.target.clear()
        if not self.guidance.start * total <= step < self.guidance.stop * total:
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        images = len(sample) // 2 if self.pipe.do_classifier_free_guidance else len(sample)
        rows, read_inputs, shared = self._guided_rows(inputs, sample, images)
        with torch.no_grad():
            prediction = predict(denoiser_of(self.pipe), sample[rows], timestep, forward=forward, **read_inputs)
            features = [feature.float() for feature in prediction.features]
            for term in terms:
                readout = term.head(features, head_time(term.head, self.pipe, timestep.expand(len(features[0]))))
                term.target.store(step, timestep.item(), readout.unflatten(0, (-1, images)))
        if not shared:
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        if len(prediction.output) < len(sample):
            return self._complete(prediction.output, rows, forward, sample, timestep, inputs)
        return prediction.output
