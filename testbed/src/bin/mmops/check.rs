//! Compares memory with the model.

use anyhow::{Result, bail, ensure};
use nix::errno::Errno;
use testbed::sys::{self, WORD_BYTES, mappings};

use crate::model::{Model, PAGE, Page, Value, WORDS, content};

impl Model {
    /// Compares everything; what cannot be read is made readable meanwhile.
    pub(crate) fn check_all(&mut self) -> Result<()> {
        let addresses: Vec<usize> = self.pages.keys().copied().collect();
        for address in addresses {
            self.check(address)?;
            let page = self.pages[&address];
            if page.prot == libc::PROT_NONE && !page.guarded {
                mappings::protect(address, PAGE, libc::PROT_READ)?;
                let shown = Page {
                    prot: libc::PROT_READ,
                    ..page
                };
                let compared = self.compare(address, shown);
                mappings::protect(address, PAGE, libc::PROT_NONE)?;
                compared?;
            }
        }
        Ok(())
    }

    /// Compares one page as it is.
    pub(crate) fn check(&mut self, address: usize) -> Result<()> {
        let page = self.pages[&address];
        if !page.is_readable() {
            let read = mappings::read(address, &mut [0]);
            if read != Err(Errno::EFAULT) {
                bail!(
                    "{}: {address:#x}, {page:?}: it can be read: {read:?}{}",
                    self.name,
                    self.history(address)
                );
            }
            return Ok(());
        }
        self.compare(address, page)
    }

    fn compare(&mut self, address: usize, page: Page) -> Result<()> {
        let before = Model::expected(&page);
        let mut words = [0; WORDS];
        let mut bytes = [0; PAGE];
        // The kernel reads it, or a load does. The call says EFAULT for any error: a load tells then.
        if self.random.below(4) == 0 && mappings::read(address, &mut bytes).is_ok() {
            for (word, bytes) in words.iter_mut().zip(bytes.chunks(WORD_BYTES)) {
                *word = u64::from_ne_bytes(bytes.try_into()?);
            }
        } else {
            sys::read_words(address, &mut words);
        }
        let (Some(before), Some(after)) = (before, Model::expected(&page)) else {
            return Ok(());
        };
        if before != after {
            // Shared memory: its writer was at it.
            return Ok(());
        }
        let is_zero = words.iter().all(|word| *word == 0);
        ensure!(
            before.iter().any(|numbers| content(*numbers) == words),
            "{}: {address:#x}, {page:?}: {}, {:x?} for {:x?}{}",
            self.name,
            if is_zero { "zero" } else { "another content" },
            &words[..2],
            before
                .iter()
                .map(|numbers| content(*numbers)[0])
                .collect::<Vec<_>>(),
            self.history(address)
        );
        if is_zero
            && matches!(page.value, Value::Freed(..))
            && let Some(page) = self.pages.get_mut(&address)
        {
            // Once it is gone it does not come back.
            page.value = Value::Zero;
        }
        Ok(())
    }
}
