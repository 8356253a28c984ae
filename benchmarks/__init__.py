"""What is measured rather than asserted: speed, memory, and how close to HF Trainer."""
