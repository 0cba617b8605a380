"""The former place of what `mmau.encoders.speech` holds."""

from mmau.encoders.speech import WAVLM_ARCHITECTURES, WavLMEncoder, tiny_wavlm, wavlm  # noqa: F401
