"""The causal audit of one or more models as a page, as a part of a page, and as text for a terminal."""

from moe_lens.audit_page.page import AUDIT_CSS, audit_page_html, audit_section, write_audit_page
from moe_lens.audit_page.text import audit_text

__all__ = ["AUDIT_CSS", "audit_page_html", "audit_section", "audit_text", "write_audit_page"]
