"""Adapters in and out: plain LoRA from a mixture, a mixture from LoRAs, other codes' formats, merged models."""
