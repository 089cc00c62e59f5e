"""Tools to test and measure jaxmoe: tiny random models, and the same models in transformers and PEFT.

Tests and benchmarks use them; wheels do not contain them.
"""
