"""cachepass in other libraries; each module needs the library that it is called after."""
