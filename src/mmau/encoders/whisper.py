"""The former place of what `mmau.encoders.speech` holds."""

from mmau.encoders.speech import WHISPER_ARCHITECTURES, WhisperEncoder, whisper  # noqa: F401
