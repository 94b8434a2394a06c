"""Skills: LoRAs that are trained apart and stand beside each other; each prompt asks the one that knows it."""
