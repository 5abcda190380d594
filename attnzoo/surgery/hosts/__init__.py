"""The families of models that surgery knows: how to read, rebuild and register with each."""
