"""`python -m lsgm.params` prints the JSON schema of params.yaml."""

from lsgm.params.schema import json_schema

print(json_schema(), end="")
