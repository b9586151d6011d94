"""cachepass: caching for diffusion transformers as a ``torch.compile`` backend.

compiled = torch.compile(model, backend="cached_inductor", fullgraph=True,
                         options={"cache": cachepass.TaylorSeerCacheConfig(cache_interval=5, max_order=1)})
"""

import lazy_loader as _lazy_loader

__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)  # what there is stands in __init__.pyi
__version__ = "0.2.0"
