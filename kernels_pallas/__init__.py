"""Accelerator kernels for transformer layers, and their plain XLA forms. Depends on jax alone.

One folder an op family. Each holds the oracle, the implementations, and one public function that chooses among them.
"""
