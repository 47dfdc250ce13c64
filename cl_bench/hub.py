"""Whether the Hugging Face hub answers from here: its libraries retry for long to find out."""

HUB_TIMEOUT = 10.0


def hub_reachable() -> bool:
    """Whether one request gets any answer; False without a try where the hub is switched off."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # the client behind get_session differs between versions, so do its errors
        return False
    return True
