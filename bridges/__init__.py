"""Models of other frameworks, regenerated from the parameter tree. Nothing here yet."""
