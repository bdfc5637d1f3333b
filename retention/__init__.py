"""When an edited language model is fine-tuned, what does it forget?"""
