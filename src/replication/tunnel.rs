//! A way to Postgres for a client that is given a Unix socket: TCP with limits in time, and TLS by this process's provider.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};
use socket2::{SockRef, TcpKeepalive};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpStream, UnixListener};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

/// Length and number of the request for TLS. Source: PostgreSQL documentation, "Message Formats", SSLRequest.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F];
/// A peer that has said nothing for so long is asked, so often and so many times, before the connection counts as broken.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);
/// Longest that what we send may stay unacknowledged.
const USER_TIMEOUT: Duration = Duration::from_secs(15);

/// Whether a connection is encrypted, and of whom that must be known: libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Never.
    Disable,
    /// If the server can, whoever it is.
    Prefer,
    /// Always, whoever it is; with a file of authorities as [`Tls::VerifyCa`].
    Require,
    /// By whoever has a certificate of a known authority.
    VerifyCa,
    /// By whoever has a certificate of a known authority for this host.
    VerifyFull,
}

/// Where a tunnel leads.
#[derive(Clone, Debug)]
pub struct TunnelTarget {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Whether it is encrypted.
    pub tls: Tls,
    /// The authorities that count, as a PEM file; without one those of this machine.
    pub root_certificate: Option<PathBuf>,
}

/// Why there is no way.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The server cannot be reached, or hangs up.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// The server does not speak TLS, and `sslmode` asks for it.
    #[error("the server does not support TLS, which sslmode asks for")]
    NoTls,
    /// TLS is not possible, or the certificate not the right one.
    #[error("no TLS")]
    Tls(#[source] io::Error),
    /// The file of authorities cannot be read.
    #[error("cannot read sslrootcert")]
    RootCertificate(#[source] rustls::pki_types::pem::Error),
    /// No certificate counts, so none can be right.
    #[error("there is no certificate authority to know the server by: set sslrootcert")]
    NoAuthority,
    /// This machine is the trouble.
    #[error("cannot make a socket")]
    Local(#[source] io::Error),
}

/// A connection to a server, behind a Unix socket that takes one client. It ends when this is dropped.
pub struct Tunnel {
    folder: TempDir,
    _forwarding: AbortOnDropHandle<()>,
}

impl Tunnel {
    /// The port in the name of the socket.
    pub const PORT: u16 = 5432;

    /// Connects, and waits for a client.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn open(target: &TunnelTarget) -> Result<Self, TunnelError> {
        let mut socket =
            TcpStream::connect((target.host.as_str(), target.port)).await.map_err(TunnelError::Connect)?;
        limit(&socket).map_err(TunnelError::Local)?;
        let is_encrypted =
            target.tls != Tls::Disable && accepts_tls(&mut socket).await.map_err(TunnelError::Connect)?;
        if !is_encrypted && !matches!(target.tls, Tls::Disable | Tls::Prefer) {
            return Err(TunnelError::NoTls);
        }
        // For this user alone, so whoever connects is this process.
        let folder = tempfile::tempdir().map_err(TunnelError::Local)?;
        let path = folder.path().join(format!(".s.PGSQL.{}", Self::PORT));
        let listener = UnixListener::bind(path).map_err(TunnelError::Local)?;
        let forwarding = if is_encrypted {
            let connector = TlsConnector::from(Arc::new(config(target)?));
            let name = ServerName::try_from(target.host.clone());
            let name = name.map_err(|error| TunnelError::Tls(io::Error::other(error)))?;
            let encrypted = connector.connect(name, socket).await.map_err(TunnelError::Tls)?;
            tokio::spawn(forward(listener, encrypted))
        } else {
            tokio::spawn(forward(listener, socket))
        };
        Ok(Self { folder, _forwarding: AbortOnDropHandle::new(forwarding) })
    }

    /// Where the socket is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Whichever side ends, so does the other.
async fn forward(listener: UnixListener, mut server: impl AsyncRead + AsyncWrite + Unpin) {
    if let Ok((mut client, _)) = listener.accept().await {
        drop(listener);
        let _ = copy_bidirectional(&mut client, &mut server).await;
    }
}

/// A connection of whose other end nothing is heard must end, or nobody would lead while it lasts.
fn limit(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let (time, interval, retries) = KEEPALIVE;
    let keepalive = TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(retries);
    let socket = SockRef::from(socket);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    Ok(())
}

async fn accepts_tls(socket: &mut TcpStream) -> io::Result<bool> {
    socket.write_all(&SSL_REQUEST).await?;
    match socket.read_u8().await? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the server is not Postgres")),
    }
}

fn config(target: &TunnelTarget) -> Result<ClientConfig, TunnelError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier: Arc<dyn ServerCertVerifier> = match target.tls {
        // As libpq has it: who names the authorities means them.
        Tls::Require if target.root_certificate.is_some() => {
            Arc::new(AnyName(authorities(target, provider.clone())?))
        }
        Tls::Disable | Tls::Prefer | Tls::Require => Arc::new(Anyone(provider.clone())),
        Tls::VerifyCa => Arc::new(AnyName(authorities(target, provider.clone())?)),
        Tls::VerifyFull => authorities(target, provider.clone())?,
    };
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(|error| TunnelError::Tls(io::Error::other(error)))?;
    Ok(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

fn authorities(
    target: &TunnelTarget,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, TunnelError> {
    let mut roots = RootCertStore::empty();
    match &target.root_certificate {
        Some(file) => {
            let found = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            roots.add_parsable_certificates(found.map_err(TunnelError::RootCertificate)?);
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build();
    verifier.map_err(|_| TunnelError::NoAuthority)
}

/// Takes every certificate, as libpq does for `require`: against who listens, not against who intercepts.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

/// Takes the certificates of the authorities, whatever host they are for.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _between: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        match self.0.verify_server_cert(certificate, between, name, ocsp, now) {
            // The name is looked at last, so all else is well.
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
