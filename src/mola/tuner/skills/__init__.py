"""Skills: plain LoRAs beside each other on one frozen base model, and the decision which of them is asked."""
