"""`lora-kernels bench` and `lora-kernels tune`: the protocol, the work, the contestants, the gate, the records, the pictures."""
