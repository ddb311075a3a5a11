"""Groups of flags that programs share."""
