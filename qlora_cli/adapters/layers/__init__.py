"""Methods that PEFT does not have, written as tuners of PEFT."""
