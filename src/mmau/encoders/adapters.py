"""The former place of what `mmau.encoders.backbone` holds."""

from mmau.encoders.backbone import (  # noqa: F401
    BottleneckAdapter,
    LayerMix,
    count_parameters,
    freeze,
    inject_lora,
)
