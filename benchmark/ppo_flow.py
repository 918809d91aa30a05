"""dbpo_finetune.py with a one-step flow policy in place of ours: PPO with ReinFlow's noise-injected likelihood.

    python benchmark/ppo_flow.py --env hopper-medium-v2 --ckpt FLOW.pt     flags of dbpo_finetune.py; ppo_rivals.py makes FLOW.pt

ReinFlow (2025) adds learned Gaussian noise to every Euler step of a flow, which gives the chain of steps a density. With one step
the chain is  a = z + v(z, t = 0, o) + sigma(o) eps : a Gaussian given z, and p(z) cancels in the ratio. That is Eq. (12) with
the mean z + v, so everything of dbpo_finetune.py but the network holds as it stands. Its anchor is ReinFlow's Wasserstein
regularisation towards the pretrained flow. Other than in ReinFlow, sigma is told the observation alone, not z and t.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from rivals.flow import Flow
from rivals.network import TIME_DIM
from torch import Tensor, nn

import dbpo_finetune
from common import run_main
from policy import Policy, PolicyConfig, make_backbone


class EulerStep(nn.Module):
    """(z (B, G, Tp, Da), cond (B, C)) -> z + v(z, t = 0, cond): a backbone, as `Policy` and `GaussianActor` call it."""

    def __init__(self, velocity: nn.Module):
        super().__init__()
        self.velocity = velocity

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        start = torch.zeros(len(cond), TIME_DIM, device=cond.device, dtype=cond.dtype)  # features of t = 0, see Rival.network
        start[:, TIME_DIM // 2 :] = 1.0  # cosines; the sines are 0
        return z + self.velocity(z, torch.cat([cond, start], -1))


class OneStepFlow(Policy):
    """A flow policy that acts with one Euler step, as an ordinary one-step policy."""

    def __init__(self, config: PolicyConfig):
        super().__init__(config)
        self.backbone = EulerStep(make_backbone(config, config.obs_steps * self.encoder.feature_dim + TIME_DIM))

    @classmethod
    def of(cls, flow: Flow) -> OneStepFlow:
        """The same weights."""
        policy = cls(flow.config)
        names = {name: name.replace("backbone.", "backbone.velocity.", 1) for name in flow.state_dict()}
        policy.load_state_dict({names[name]: value for name, value in flow.state_dict().items()}, strict=True)
        return policy


if __name__ == "__main__":
    dbpo_finetune.Policy = OneStepFlow  # the one class that the script loads and resumes its policies with
    run_main(dbpo_finetune.main)
