"""Streaming with a language model that learns by playing, to compare with learning from experience."""

from netllm_pl.backbone import BackboneConfig
from netllm_pl.errors import UserError
from netllm_pl.online import Method, OnlineTask
from netllm_pl.task import OptimizerConfig
from tasks.adaptive_bitrate.data import AdaptiveBitrateData
from tasks.adaptive_bitrate.simulator import Simulator
from tasks.adaptive_bitrate.task import AdaptiveBitrate


class OnlineBitrate(OnlineTask, AdaptiveBitrate):
    """`AdaptiveBitrate` that learns by playing, with PPO (Schulman et al., 2017, arXiv:1707.06347) or DQN.

    Set ``data.experience`` to null: then ``data.batch_size`` is the number of groups of sessions in a step, and
    ``data.sessions`` that of groups in an epoch.

    Args:
        backbone: The language model.
        optimizer: AdamW's settings.
        levels: Levels of the bitrate ladder (L).
        history: Samples of history in an observation, as the data gives them.
        lookahead: Chunks whose sizes are seen, as the data gives them.
        context: Steps that a decision sees, the current one included.
        width: Size of the encoders' hidden layers.
        head_width: Hidden layer of the head; null is a single linear layer.
        group: Sessions of the same trace, start and noise.
        discount: Weight of a reward one chunk later.
        epochs: Passes over the sessions of a step.
        minibatches: Parts of a pass.
        clip: Bound on the change of a probability, as a share.
        entropy: Weight of the policy's entropy at the start and at the end of training; it falls geometrically.
        rollout_every: Validations between two evaluations by rollout.
        method: ``ppo``; or ``dqn`` (Mnih et al., 2015), which takes no clip and no entropy.
        explore: Of DQN, the share of random actions at the start and at the end of training; it falls geometrically.
        remembered: Of DQN, the steps whose sessions are remembered.
    """

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008  # frozen
        optimizer: OptimizerConfig | None = None,
        levels: int = 6,
        history: int = 10,
        lookahead: int = 5,
        context: int = 20,
        width: int = 128,
        head_width: int | None = 256,
        group: int = 8,
        discount: float = 0.99,
        epochs: int = 4,
        minibatches: int = 4,
        clip: float = 0.2,
        entropy: tuple[float, float] = (0.1, 0.002),
        rollout_every: int = 1,
        method: Method = "ppo",
        explore: tuple[float, float] = (0.5, 0.02),
        remembered: int = 8,
    ) -> None:
        AdaptiveBitrate.__init__(
            self, backbone, optimizer, levels, history, lookahead, rescale=0.0, context=context, width=width,
            head_width=head_width, rollout_every=rollout_every,
        )  # fmt: skip
        self.online(group, discount, epochs, minibatches, clip, entropy, method, explore, remembered)

    def environment(self, split: str) -> Simulator:
        """Return the split's own sessions; in training, random ones."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, AdaptiveBitrateData):
            raise UserError("OnlineBitrate learns by playing; give it AdaptiveBitrateData")
        return data.simulator(split, "random" if split == "train" else None)
