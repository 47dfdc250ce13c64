"""FFA-LoRA (Sun et al., ICLR 2024): A stays as it was drawn, clients train B, the mean is exact."""

from typing import ClassVar

from cl_bench.strategies.federated.fed_lora import FedLoRA


class FFALoRA(FedLoRA):
    """Federated averaging of B alone."""

    fixed_down: ClassVar[bool] = True
