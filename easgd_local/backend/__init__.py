"""The operations that rules are written in: `operations` lists them, `cpu` defines them, `cuda` launches kernels."""
