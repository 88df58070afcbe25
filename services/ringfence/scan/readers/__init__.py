"""The list of all readers. A reader that is not in it is never used."""

from __future__ import annotations

from typing import Final

from ringfence.scan.readers.agent_logins import AgentLoginReader
from ringfence.scan.readers.aws import AwsCacheReader, AwsCredentialsReader
from ringfence.scan.readers.azure import AzureReader
from ringfence.scan.readers.ci_files import CiReader
from ringfence.scan.readers.cloud_metadata import CloudMetadataReader
from ringfence.scan.readers.database_clients import MysqlReader, NetrcReader, PgpassReader
from ringfence.scan.readers.deployments import ComposeReader, HelmValuesReader, KubernetesReader
from ringfence.scan.readers.docker import DockerReader
from ringfence.scan.readers.forge_clis import GithubCliReader, GitlabCliReader
from ringfence.scan.readers.gcloud import GcloudReader, GcpServiceAccountReader
from ringfence.scan.readers.git import GitConfigReader, GitCredentialsReader
from ringfence.scan.readers.infrastructure import TerraformReader, VaultReader
from ringfence.scan.readers.keyrings import KeyringReader
from ringfence.scan.readers.kubeconfig import KubeconfigReader
from ringfence.scan.readers.mcp_clients import readers as mcp_readers
from ringfence.scan.readers.package_managers import (
    CargoReader,
    GradleReader,
    MavenReader,
    NpmReader,
    PythonIndexReader,
)
from ringfence.scan.readers.processes import EnvironmentReader, ProcessReader
from ringfence.scan.readers.reader import FileReader, MachineReader
from ringfence.scan.readers.schedulers import CrontabReader, SystemdReader
from ringfence.scan.readers.service_account import MountedSecretReader, ServiceAccountReader
from ringfence.scan.readers.shell_files import DotenvReader, ShellFileReader
from ringfence.scan.readers.ssh import SshAgentReader, SshKeyReader
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
