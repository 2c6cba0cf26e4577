"""A zoo of tiny denoisers with fitting inputs: one for every Diffusion Transformer class of diffusers.

``ZOO`` maps class names to entries; ``LEFT_OUT`` says why a model class called a Transformer or DiT is not there::

    for entry in ZOO.values():
        torch.manual_seed(0)
        model = entry.build()
        output = model(**entry.inputs(2))

Each family of repeated blocks has at least three of them; refiners and text stacks may have fewer. Sizes within a model
(tokens, text tokens, width, heads, batch) differ wherever its architecture lets them.
"""

from __future__ import annotations

import zoo_audio
import zoo_image
import zoo_video
from zoo_base import ZOO, Entry

__all__ = ["LEFT_OUT", "ZOO", "Entry", "zoo_audio", "zoo_image", "zoo_video"]

LEFT_OUT: dict[str, str] = {
    "DreamLiteTransformer2DModel": "one stage of a UNet; works on its feature maps, not on noise",
    "DualTransformer2DModel": "two stages of a UNet side by side",
    "HunyuanDiT2DControlNetModel": "a ControlNet",
    "HunyuanDiT2DMultiControlNetModel": "several ControlNets",
    "LongCatAudioDiTVae": "an autoencoder",
    "TransformerSpatioTemporalModel": "one stage of a video UNet",
    "TransformerTemporalModel": "one stage of a video UNet",
    "UTransformer2DModel": "the trunk of UniDiffuserModel, which is here",
}
