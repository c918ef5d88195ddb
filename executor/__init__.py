"""Side effects: carry a plan out with torch, transformers, peft, accelerate and bitsandbytes."""
