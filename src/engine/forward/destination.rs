//! Looks at where dumps are to be forwarded to before the first one comes: a frozen tree is too late to learn
//! that nobody there can take it.
//!
//! The greeting has the number of no attempt, so no session begins at the far end. A page-server that receives
//! refuses it and waits on: builds that know of this look because they know it, older ones because a newer
//! connection must have taken the place of one with such a number.

use std::sync::Arc;

use crate::engine::ferry::conn::{Conn, ConnError};
use crate::engine::ferry::handshake::first_frame;
use crate::engine::ferry::{WINDOW, connection_loop};
use crate::engine::io::transport::{Peer, transport};
use crate::error::{Error, Kind, Result};
use crate::ferry::frame;
use crate::ferry::hash::HashKey;
use crate::ferry::hello::{
    Fail, FailCode, Features, Hello, LOOK_ATTEMPT, Role, SessionId, VERSION,
};
use crate::stream::Stream;
use crate::tls::Tls;
use crate::units::PageSize;

/// How a page-server that receives dumps refuses a look: the last two are the texts of builds that do not know
/// of looks, without and with a session that is open.
const RECEIVES: [FailCode; 3] = [
    FailCode::UnknownSession,
    FailCode::Superseded,
    FailCode::Busy,
];

/// Checks that a page-server that receives dumps is at `peer`. Returns why nobody can be reached there, if that
/// is so: it may be started later.
///
/// # Errors
///
/// [`Kind::Usage`]: the name has no address, what answers is something else, or TLS refuses it.
pub fn check_destination(peer: &Peer, tls: Option<&Tls>, page: PageSize) -> Result<Option<Error>> {
    peer.resolve()?;
    let socket = match peer.connect() {
        Ok(socket) => socket,
        Err(error) => return Ok(Some(error)),
    };
    let unusable = |error: Error| {
        let text = format!("--forward {peer} cannot be used");
        Error::wrap(Kind::Usage, text, error)
    };
    let stream = Stream::plain(socket).secure_to(tls, peer.host());
    match greet(stream.map_err(unusable)?, page) {
        Ok(fail) if RECEIVES.contains(&fail.code) => Ok(None),
        Ok(fail) => Err(unusable(Error::new(Kind::Protocol, fail.text))),
        Err(error) => {
            let text = format!(
                "--forward {peer}: what answers there is no page-server that receives dumps (one that was \
                 started without --lazy-pages, --forward and --forward-lazy)"
            );
            Err(Error::wrap(Kind::Usage, text, error))
        }
    }
}

/// Greets the far end without a session, and returns how it refuses.
fn greet(stream: Stream, page: PageSize) -> std::result::Result<Fail, ConnError> {
    let hello = Hello {
        version: VERSION,
        role: Role::Sender,
        page,
        features: Features::ALL,
        // One for all looks: builds that do not know of them remember it.
        session: SessionId::default(),
        stream: 0,
        streams: 1,
        attempt: LOOK_ATTEMPT,
        // Builds that do not know of looks take a session that is only continued for the one to come.
        opening: true,
        window: WINDOW,
        hash_key: HashKey::default(),
    };
    let mut conn = Conn::new(transport(stream)?, Arc::default());
    connection_loop::prepare(&conn);
    let mut words = Vec::new();
    hello.encode(frame::Kind::Hello, &mut words);
    conn.queue(Arc::new(words));
    let answer = first_frame(&mut conn)?;
    match answer.kind {
        frame::Kind::Fail => Ok(Fail::decode(&answer.body)?),
        _ => Err(ConnError::End),
    }
}
