//! One client's connection, and the one to the service that belongs to it.

use std::rc::Rc;

use pageferry::limits::REPLAY_PIECE_BYTES_MAX;
use pageferry::replay::Entry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::coordinator::Coordinator;

/// Forgets the connection whatever ends it.
struct Registered {
    coordinator: Rc<Coordinator>,
    connection: u32,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.coordinator.forget(self.connection);
    }
}

/// Passes bytes in both directions until the service ends the connection.
pub(super) async fn run(
    coordinator: Rc<Coordinator>,
    connection: u32,
    client: TcpStream,
    service: TcpStream,
) {
    let registered = Registered {
        coordinator,
        connection,
    };
    let coordinator = &registered.coordinator;
    for stream in [&client, &service] {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("connection {connection}: {error}");
        }
    }
    let (from_client, to_client) = client.into_split();
    let (from_service, to_service) = service.into_split();
    let answers = pass_answers(coordinator, connection, from_service, to_client);
    let pieces = pass_pieces(coordinator, connection, from_client, to_service);
    tokio::pin!(answers);
    tokio::select! {
        () = &mut answers => {}
        // The halves stay open until the service has ended the connection too.
        _halves = pieces => answers.await,
    }
}

async fn pass_pieces(
    coordinator: &Coordinator,
    connection: u32,
    mut client: OwnedReadHalf,
    mut service: OwnedWriteHalf,
) -> (OwnedReadHalf, OwnedWriteHalf) {
    let mut buffer = vec![0; REPLAY_PIECE_BYTES_MAX];
    loop {
        let read = tokio::select! {
            read = client.read(&mut buffer) => read.unwrap_or(0),
            () = coordinator.stopped() => 0,
        };
        if read == 0 {
            break;
        }
        let bytes = buffer[..read].to_vec();
        let entry = Entry::Piece { connection, bytes };
        // What is not passed was not acknowledged.
        if !coordinator.pass(connection, &entry).await
            || service.write_all(&buffer[..read]).await.is_err()
        {
            return (client, service);
        }
    }
    if coordinator
        .pass(connection, &Entry::Finish { connection })
        .await
    {
        // It may be gone already.
        let _ = service.shutdown().await;
    }
    (client, service)
}

async fn pass_answers(
    coordinator: &Coordinator,
    connection: u32,
    mut service: OwnedReadHalf,
    mut client: OwnedWriteHalf,
) {
    let mut buffer = vec![0; REPLAY_PIECE_BYTES_MAX];
    let mut is_client_there = true;
    loop {
        let read = service.read(&mut buffer).await.unwrap_or(0);
        if read == 0 {
            break;
        }
        // What a client does next may depend on this.
        coordinator.answered(connection, &buffer[..read]);
        // Answers count even if the client is gone.
        is_client_there = is_client_there && client.write_all(&buffer[..read]).await.is_ok();
    }
    coordinator.ended(connection);
    let _ = client.shutdown().await;
}
