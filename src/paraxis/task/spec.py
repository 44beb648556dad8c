"""What is trained, as data that travels to every rank: network, batches, loss, optimiser, seed."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

SHIPPED = ("mlp", "cnn", "resnet18", "gpt")  # the families of `networks`
DEFAULT_BATCH = 128
FAMILIES: dict[str, dict[str, Any]] = {"gpt": {"data": "text", "batch": 32, "optimizer": "adamw", "lr": 1e-3}}


class TaskSpec(BaseModel):
    """A task in words. `network` is a shipped one or FILE.py[:FUNCTION]; `live` objects come by pipe instead.

    `batch` is the global batch in samples (None: 128, or what the user's batches hold). `bn_group` is the number of
    consecutive samples that batch-norm statistics cover (None: those that a plan computes at once; the whole batch:
    those of all replicas). `horizon` is the number of steps over which a cosine falls. `validation` is the fraction of
    the training samples held out. FAMILIES says which families of networks have other defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: str = "cnn"
    data: str | None = None
    batch: int | None = None
    bn_group: int | None = None
    seed: int = 0
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.05
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 0.0
    clip: float | None = None
    lr_schedule: Literal["constant", "warmup", "cosine"] = "constant"
    warmup: int = 0
    horizon: int = 0
    validation: float = 0.0
    live: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_family(cls, given: Any) -> Any:
        """What the network's family has instead of the defaults, where nothing is said; sgd has a rate of its own."""
        if not isinstance(given, dict) or given.get("live"):
            return given
        own = FAMILIES.get(str(given.get("network")).partition(":")[0], {})
        if given.get("optimizer") == "sgd":
            own = {key: value for key, value in own.items() if key != "lr"}
        return given | {key: value for key, value in own.items() if given.get(key) is None}

    @property
    def sgd_momentum(self) -> float:
        """SGD's momentum: 0.9 unless it is given."""
        return 0.9 if self.momentum is None else self.momentum

    @model_validator(mode="after")
    def _check(self) -> "TaskSpec":
        bounds: list[tuple[bool, str]] = [
            (self.batch is None or self.batch >= 1, f"batch={self.batch}: it takes at least one sample"),
            (self.bn_group is None or self.bn_group >= 1, f"bn_group={self.bn_group}: it takes at least one sample"),
            (self.lr > 0, f"lr={self.lr:g}: the learning rate must be above 0"),
            (0 <= self.sgd_momentum < 1, f"momentum={self.momentum}: it takes 0 to below 1"),
            (not self.nesterov or self.sgd_momentum > 0, "nesterov needs a momentum above 0, such as momentum=0.9"),
            (self.optimizer == "sgd" or not self.momentum, f"momentum belongs to sgd; {self.optimizer} has its own"),
            (self.weight_decay >= 0, f"weight_decay={self.weight_decay:g}: it takes 0 or more"),
            (self.clip is None or self.clip > 0, f"clip={self.clip}: the largest gradient norm must be above 0"),
            (0 <= self.validation < 1, f"validation={self.validation:g}: it takes a fraction from 0 to below 1"),
            (self.warmup >= 0, f"warmup={self.warmup}: it takes 0 or more steps"),
            (self.lr_schedule != "warmup" or self.warmup > 0, "lr_schedule=warmup needs warmup steps, such as 100"),
        ]
        for fine, message in bounds:
            if not fine:
                raise ValueError(message)
        return self

    @property
    def own_file(self) -> bool:
        """Whether the network is a user's file."""
        return self.network.partition(":")[0].endswith(".py")
