"""What jaxmoe is tested and measured with: tiny random models, and the same models in transformers and PEFT.

Tests and benchmarks use it; wheels do not contain it.
"""
