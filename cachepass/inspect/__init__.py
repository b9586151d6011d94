"""Looking at what caching will do (explain) and did (summary)."""
