"""lowbit: which low-bit format should Llama-3.1 run in on this GPU, and did last night's upgrade make it worse?"""

__version__ = "0.1.0"
