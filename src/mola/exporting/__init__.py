"""Converts adapters: mixtures to plain LoRA, LoRAs to mixtures, formats of other programs, merged models."""
