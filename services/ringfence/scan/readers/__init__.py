"""The list of all readers of credentials. A reader that is not in it is never used.

Enters: untrusted files, environments and the cloud metadata service (only with `--metadata`).
Leaves: candidates.
Imports: `scan.candidates` and the layers below it; no httpx, Kafka or Redis.
Read first: reader.py (the interface), text_files.py (reads what no other reader reads), clouds.py (AWS,
Azure, Google).
"""

from __future__ import annotations

from typing import Final

from ringfence.scan.readers.agents import AgentLoginReader
from ringfence.scan.readers.agents import readers as mcp_readers
from ringfence.scan.readers.clouds import (
    AwsCacheReader,
    AwsCredentialsReader,
    AzureReader,
    GcloudReader,
    GcpServiceAccountReader,
    MountedSecretReader,
    ServiceAccountReader,
)
from ringfence.scan.readers.containers import (
    ComposeReader,
    DockerReader,
    HelmValuesReader,
    KubeconfigReader,
    KubernetesReader,
)
from ringfence.scan.readers.database_clients import MysqlReader, NetrcReader, PgpassReader
from ringfence.scan.readers.forges import (
    CiReader,
    GitConfigReader,
    GitCredentialsReader,
    GithubCliReader,
    GitlabCliReader,
)
from ringfence.scan.readers.infrastructure import CloudMetadataReader, TerraformReader, VaultReader
from ringfence.scan.readers.package_managers import (
    CargoReader,
    GradleReader,
    MavenReader,
    NpmReader,
    PythonIndexReader,
)
from ringfence.scan.readers.processes import (
    CrontabReader,
    DotenvReader,
    EnvironmentReader,
    ProcessReader,
    ShellFileReader,
    SystemdReader,
)
from ringfence.scan.readers.reader import FileReader, MachineReader
from ringfence.scan.readers.ssh import KeyringReader, SshAgentReader, SshKeyReader
from ringfence.scan.readers.text_files import TextFileReader

FILE_READERS: Final[tuple[FileReader, ...]] = (
    *mcp_readers(),
    AgentLoginReader(),
    AwsCredentialsReader(), AwsCacheReader(),
    GcloudReader(), AzureReader(),
    DockerReader(),
    GithubCliReader(), GitlabCliReader(),
    GitCredentialsReader(), GitConfigReader(),
    NetrcReader(), PgpassReader(), MysqlReader(),
    NpmReader(), PythonIndexReader(), CargoReader(), MavenReader(), GradleReader(),
    TerraformReader(), VaultReader(),
    ServiceAccountReader(), MountedSecretReader(),
    SshKeyReader(), KeyringReader(),
    CiReader(), ComposeReader(),
    ShellFileReader(), SystemdReader(), CrontabReader(),
    DotenvReader(),
    GcpServiceAccountReader(), KubeconfigReader(), KubernetesReader(), HelmValuesReader(),
)  # fmt: skip
"""In this order: the first whose path matches and that accepts the file reads it."""

TEXT_READER: Final = TextFileReader()
"""Reads what no other does."""

MACHINE_READERS: Final[tuple[MachineReader, ...]] = (
    EnvironmentReader(), ProcessReader(), SshAgentReader(), CloudMetadataReader()
)  # fmt: skip
