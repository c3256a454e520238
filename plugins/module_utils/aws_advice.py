# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What to do about an error of the AWS SDK, in one line. Knows exceptions by name, so that it needs no SDK itself."""

from __future__ import annotations

from typing import Any

EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired")
REFUSED = (
    "AuthFailure",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
)
DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation")
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
SSO = ("SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "SSOError", "LoginRefreshRequired")
NO_NETWORK = (
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "ProxyConnectionError",
    "ReadTimeoutError",
    "SSLError",
)
NO_REGION = ("InvalidRegionError", "NoRegionError")

GET_CREDENTIALS = (
    "log in (aws sso login, aws configure) and set AWS_PROFILE, or set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for"
    " temporary ones, AWS_SESSION_TOKEN"
)
EXPIRED_ADVICE = (
    "the AWS token has expired: log in again (aws sso login, or fetch new temporary keys) and repeat the command"
)


def error_code(error: BaseException) -> str:
    """The AWS code of a ClientError, else the name of the exception's class."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict) and response.get("Error", {}).get("Code"):
        return str(response["Error"]["Code"])
    return type(error).__name__


def explain(error: BaseException, region: str = "", endpoint_url: str = "") -> str:
    """One line: what went wrong and what to do."""
    code = error_code(error)
    where = endpoint_url or f"AWS in {region or 'no region'}"
    detail = " ".join(str(error).split())
    if code in EXPIRED:
        return EXPIRED_ADVICE
    if code in SSO:
        return f"the AWS login is missing or over ({detail}): run aws sso login"
    if code in NO_CREDENTIALS:
        return f"no AWS credentials: {GET_CREDENTIALS}"
    if code == "ProfileNotFound":
        return f"{detail}: correct AWS_PROFILE, or run aws configure"
    if code in REFUSED:
        return (
            f"{where} does not accept these credentials ({code}): check AWS_PROFILE or the AWS_* variables, and that the"
            " region is switched on for the account"
        )
    if code in DENIED:
        return f"these credentials may not do this ({detail}): ask for the permission, or choose another AWS_PROFILE"
    if code in NO_REGION:
        return f"{detail}: correct nemo_region and the regions of the inventory file"
    if code in NO_NETWORK:
        return f"{where} cannot be reached ({detail}): check the network, the region's name and nemo_aws_endpoint_url"
    return f"{where}: {code}: {detail}"
