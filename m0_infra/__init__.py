"""The ground the stages stand on: environment check, model fetch, parity and stage manifest."""
